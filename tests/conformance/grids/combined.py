"""Variants of techniques in combinations that their own grids leave out."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
AMP: Final[Document] = {"precision": "amp_bf16"}
ACCUMULATED: Final[Document] = {"gradient_accumulation_steps": 2}
PADDED: Final[Document] = {"padding": True}
AUTOCAST: Final[Document] = {"autocast": "bf16"}


def _lora(*others: Document, **knobs: Any) -> Document:
    document: Document = {"method": {"name": "lora", "r": 12, **knobs}}
    for other in others:
        document |= other
    return document


def _optimizer(name: str, *others: Document, **knobs: Any) -> Document:
    document: Document = {"optimizer": {"name": name, **knobs}, **SHORT}
    for other in others:
        document |= other
    return document


def _each(name: str, knobs: Document) -> dict[str, Document]:
    """Return a variant of LoRA with checkpointing, with padding and under autocast."""
    return {
        f"{name} combined, checkpointed": _lora(CHECKPOINTED, **knobs),
        f"{name} combined, padded": _lora(PADDED, **knobs),
        f"{name} combined, autocast": _lora(AUTOCAST, CHECKPOINTED, **knobs),
    }


_NF4: Final[Document] = {"quantization": {"name": "nf4"}, "autocast": "bf16"}

RECIPES: Final[dict[str, Document]] = {
    **_each("rslora", {"use_rslora": True}),
    **_each("pissa", {"init_lora_weights": "pissa"}),
    **_each("olora", {"init_lora_weights": "olora"}),
    **_each("lora+", {"loraplus_lr_ratio": 16.0}),
    "loftq combined, checkpointed": _lora(_NF4, CHECKPOINTED, init_lora_weights="loftq"),
    "loftq combined, padded": _lora(_NF4, PADDED, init_lora_weights="loftq"),
    "loftq combined, short": _lora(_NF4, SHORT, init_lora_weights="loftq"),
    "lora_bias combined, checkpointed": _lora(CHECKPOINTED, lora_bias=True),
    "rank_pattern combined, checkpointed": _lora(CHECKPOINTED, rank_pattern={"q_proj": 64}),
    "lora dropout combined, accumulated": _lora(ACCUMULATED, lora_dropout=0.05),
    "tf32 combined, checkpointed": {"precision": "tf32", **CHECKPOINTED},
    "tf32 combined, lora": _lora({"precision": "tf32"}),
    "tf32 combined, gpt2": {"precision": "tf32", **ACCUMULATED},
    "ema on the host combined, lora": _lora({"loop": {"ema": "cpu"}}),
    "ema on the host combined, amp": {**AMP, **SHORT, "loop": {"ema": "cpu"}},
    "ema on the host combined, gpt2": {**CHECKPOINTED, "loop": {"ema": "cpu"}},
    "galore layerwise combined, amp": _optimizer("galore_adamw_layerwise", AMP, rank=64),
    "galore layerwise combined, gpt2": _optimizer("galore_adamw_layerwise"),
    "galore 8-bit layerwise combined, checkpointed": _optimizer(
        "galore_adamw_8bit_layerwise", CHECKPOINTED
    ),
    "galore 8-bit layerwise combined, tied": _optimizer("galore_adamw_8bit_layerwise"),
    "galore 8-bit layerwise combined, gpt2": _optimizer("galore_adamw_8bit_layerwise"),
    "apollo-mini combined, checkpointed": _optimizer("apollo_mini", CHECKPOINTED),
    "apollo-mini combined, gpt2": _optimizer("apollo_mini"),
    "apollo layerwise combined, checkpointed": _optimizer("apollo_adamw_layerwise", CHECKPOINTED),
    "apollo layerwise combined, gpt2": _optimizer("apollo_adamw_layerwise"),
    "amsgrad combined, lora": _lora(SHORT, {"optimizer": {"name": "adamw", "amsgrad": True}}),
    "adafactor with momentum combined, checkpointed": _optimizer(
        "adafactor", CHECKPOINTED, beta1=0.9
    ),
    "nesterov combined, single, checkpointed": _optimizer(
        "sgd", CHECKPOINTED, momentum=0.9, nesterov=True, implementation="single"
    ),
    "nesterov combined, amp": _optimizer(
        "sgd", AMP, momentum=0.9, nesterov=True, implementation="single"
    ),
    "nesterov combined, gpt2": _optimizer(
        "sgd", momentum=0.9, nesterov=True, implementation="single"
    ),
    "adalora scored combined, checkpointed": {
        "method": {"name": "adalora", "update_and_allocate": True}, **SHORT, **CHECKPOINTED,
    },
    "adalora scored combined, amp": {
        "method": {"name": "adalora", "update_and_allocate": True}, **SHORT, **AMP,
    },
    "lisa rebuilt combined, accumulated": {
        "method": {"name": "lisa", "keep_states": False}, **SHORT, **ACCUMULATED,
    },
    "lisa rebuilt combined, amp": {
        "method": {"name": "lisa", "keep_states": False}, **SHORT, **AMP,
    },
    "prefix projection combined, accumulated": {
        "method": {"name": "prefix_tuning", "prefix_projection": True}, **ACCUMULATED,
    },
    "fp8 full weight gradient combined, checkpointed": {
        "fp8": {"name": "torchao", "recipe": "rowwise_with_gw_hp"}, "loss": "chunked",
        **CHECKPOINTED,
    },
    "fp8 full weight gradient combined, accumulated": {
        "fp8": {"name": "torchao", "recipe": "rowwise_with_gw_hp"}, "loss": "chunked",
        **ACCUMULATED,
    },
    "autocast over bf16 combined, checkpointed": {**AUTOCAST, **CHECKPOINTED},
    "accumulation combined, amp": {**AMP, **ACCUMULATED},
    "outputs kept combined, checkpointed": {"loop": {"keep_outputs": True}, **CHECKPOINTED},
    "sdpa_flash combined, lora": _lora({"attention": "sdpa_flash"}),
    "packing combined, flash checkpointed": {
        "packing": True, "attention": "flash_attention_2", **CHECKPOINTED,
    },
    "packing combined, flash lora": _lora({"packing": True, "attention": "flash_attention_2"}),
    "double quantization combined, padded": _lora(_NF4, PADDED, CHECKPOINTED),
    "storage type combined, checkpointed": _lora(
        {"quantization": {"name": "nf4", "quant_storage": "bfloat16"}, **AUTOCAST}, CHECKPOINTED
    ),
    "skipped modules combined, checkpointed": _lora(
        {"quantization": {"name": "nf4", "skip_modules": ["down_proj", "lm_head"]}},
        AUTOCAST,
        CHECKPOINTED,
    ),
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    recipe: "gpt2" if recipe.endswith("gpt2") else "llama-tied"
    for recipe in RECIPES
    if recipe.endswith(("gpt2", "tied"))
}

FAST: Final[frozenset[str]] = frozenset()
