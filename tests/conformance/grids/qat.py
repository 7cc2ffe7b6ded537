"""Quantization-aware training: fake-quantized linear layers, trained in full."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

QAT: Final[Document] = {"qat": {"name": "torchao"}, "optimizer": "adamw_torch"}
WEIGHTS: Final[Document] = {**QAT, "qat": {"name": "torchao", "activation_dtype": None}}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}

RECIPES: Final[dict[str, Document]] = {
    "qat": QAT,
    "qat weights alone": WEIGHTS,
    "qat amp": {**QAT, "precision": "amp_bf16"},
    "qat checkpointed": {**QAT, **CHECKPOINTED},
    "qat weights alone amp checkpointed accumulation": {
        **WEIGHTS, **CHECKPOINTED, "precision": "amp_bf16", "gradient_accumulation_steps": 4,
    },
    "qat fp32 biases padded": {**QAT, "precision": "fp32", "padding": True},
    "qat partial": {**QAT, "method": {"name": "partial", "last_layers": 2}},
    "qat tied": {**QAT, **CHECKPOINTED, "qat": {"name": "torchao", "group_size": 64}},
}  # fmt: skip

# 3016, the width of the MLP of "llama", is no multiple of 32.
MODELS: Final[dict[str, str]] = {
    **dict.fromkeys(RECIPES, "llama-mha"),
    "qat fp32 biases padded": "qwen2",
    "qat tied": "llama-tied",
}

FAST: Final = frozenset({"qat checkpointed"})
