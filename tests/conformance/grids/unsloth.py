"""Unsloth's kernels for LoRA and QLoRA, with its loss."""

from __future__ import annotations

from typing import Any, Final

_LORA: Final[dict[str, Any]] = {
    "kernels": ["unsloth"],
    "method": {"name": "lora", "r": 16, "lora_dropout": 0.0},
    "autocast": "bf16",
}
_QLORA: Final[dict[str, Any]] = {
    **_LORA, "quantization": {"name": "nf4", "prepare_kbit": False}, "optimizer": "adamw_8bit",
}  # fmt: skip
_CHECKPOINTED: Final[dict[str, Any]] = {"activation_checkpointing": "full"}
# As Mistral 7B v0.3: no window.
_MISTRAL: Final[dict[str, Any]] = {
    "model_type": "mistral", "hidden_size": 1024, "intermediate_size": 3584,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 32769, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "unsloth": _LORA,
    "unsloth without autocast, checkpointed": {**_LORA, **_CHECKPOINTED, "autocast": None},
    "unsloth reentrant, accumulation": {
        **_LORA, "activation_checkpointing": "full_reentrant", "gradient_accumulation_steps": 3,
    },
    "unsloth tied head": {**_LORA, **_CHECKPOINTED},
    "unsloth qlora": _QLORA,
    "unsloth qlora checkpointed": {**_QLORA, **_CHECKPOINTED},
    "unsloth qlora, model_type mistral": {
        **_QLORA, "activation_checkpointing": "full_reentrant", "model": {"config": _MISTRAL},
    },
    "unsloth qlora, plain scales": {
        **_QLORA, **_CHECKPOINTED,
        "quantization": {"name": "nf4", "prepare_kbit": False, "double_quant": False},
    },
    "unsloth qlora, chunks": {
        **_QLORA, **_CHECKPOINTED, "micro_batch_size": 8, "seq_len": 4096,
    },
}  # fmt: skip

MODELS: Final[dict[str, str]] = {"unsloth tied head": "llama-tied"}

FAST: Final = frozenset({"unsloth qlora checkpointed"})
