"""Products in 8-bit floats over weights that are not: torchao, and Transformer Engine."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

FP8: Final[Document] = {"fp8": {"name": "torchao"}, "optimizer": "adamw_torch"}
TE: Final[Document] = {"fp8": "te", "optimizer": "adamw_torch"}
CHUNKED: Final[Document] = {"loss": "chunked"}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}


def _recipe(recipe: str, **knobs: Any) -> Document:
    return {**FP8, "fp8": {"name": "torchao", "recipe": recipe, **knobs}}


def _lora(r: int, **changes: Any) -> Document:
    """Return LoRA of a rank whose adapters are converted too if 16 divides it."""
    return {**FP8, "method": {"name": "lora", "r": r, "lora_dropout": 0.05}, **changes}


RECIPES: Final[dict[str, Document]] = {
    "fp8": FP8,
    "fp8 amp": {**FP8, "precision": "amp_bf16"},
    "fp8 fp32": {**FP8, **CHUNKED, "precision": "fp32"},
    "fp8 aligned": {**FP8, **CHUNKED, "seq_len": 1008},
    "fp8 unpadded": {**_recipe("tensorwise", pad_inner_dim=False), **CHUNKED, "seq_len": 1008},
    "fp8 checkpointed": {**FP8, **CHUNKED, **CHECKPOINTED},
    "fp8 accumulation amp": {
        **FP8, **CHUNKED, "precision": "amp_bf16", "gradient_accumulation_steps": 4,
    },
    "fp8 rowwise": {**_recipe("rowwise"), **CHUNKED},
    "fp8 rowwise amp checkpointed": {
        **_recipe("rowwise"), **CHUNKED, **CHECKPOINTED, "precision": "amp_bf16",
    },
    "fp8 rowwise fp32": {**_recipe("rowwise"), **CHUNKED, "precision": "fp32"},
    "fp8 rowwise with full weight gradient": {**_recipe("rowwise_with_gw_hp"), **CHUNKED},
    "fp8 rowwise with full weight gradient, unpadded amp": {
        **_recipe("rowwise_with_gw_hp", pad_inner_dim=False), **CHUNKED, "precision": "amp_bf16",
    },
    "fp8 filtered": {**_recipe("rowwise", filter_fqns=["lm_head", "mlp"]), **CHUNKED},
    "fp8 lora": {**_lora(12), **CHUNKED},
    "fp8 lora adapters too amp": {**_lora(16, precision="amp_bf16"), **CHUNKED},
    "fp8 lora adapters too checkpointed": {**_lora(16), **CHUNKED, **CHECKPOINTED},
    "fp8 biases padded amp": {
        **FP8, **CHUNKED, "precision": "amp_bf16", "padding": True,
    },
    "fp8 partial": {**FP8, **CHUNKED, "method": {"name": "partial", "last_layers": 2}},
    "fp8 opt": FP8,
    "fp8 gemma2 eager": {**FP8, "attention": "eager"},
    "fp8 tied": {**_recipe("tensorwise", filter_fqns=["down_proj"]), "precision": "amp_bf16"},
    "fp8 te amp": {**TE, "precision": "amp_bf16"},
    "fp8 te checkpointed": {**TE, **CHUNKED, **CHECKPOINTED},
    "fp8 te amp reentrant accumulation": {
        **TE, **CHUNKED, "precision": "amp_bf16", "gradient_accumulation_steps": 4,
        "activation_checkpointing": "full_reentrant",
    },
    "fp8 te bf16 chunked": {**TE, **CHUNKED},
    "fp8 te stopping in the MLP": {**TE, "autocast": "bf16"},
    "fp8 te tied gemma2": {**TE, **CHECKPOINTED, "precision": "amp_bf16"},
}  # fmt: skip

# The sizes of "llama" are no multiples of 16 in the MLP; those of these models are throughout.
MODELS: Final[dict[str, str]] = {
    **{name: "llama-mha" for name in RECIPES if name not in ("fp8", "fp8 amp")},
    "fp8 biases padded amp": "qwen2",
    "fp8 opt": "opt",
    "fp8 gemma2 eager": "gemma2",
    "fp8 tied": "llama-tied",
    "fp8 te stopping in the MLP": "llama",
    "fp8 te tied gemma2": "gemma2",
}

FAST: Final = frozenset({"fp8 aligned", "fp8 rowwise amp checkpointed"})
