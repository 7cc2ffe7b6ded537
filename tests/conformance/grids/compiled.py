"""Models that torch.compile compiles whole: inductor's own code around kernels that do nothing.

Slow for a grid: every layer is compiled. So no case is a part of every test run; one small model is
compared in tests/profiler/test_inductor.py.
"""

from __future__ import annotations

from typing import Any, Final

_COMPILED: Final[dict[str, Any]] = {"kernels": ["compile"], "optimizer": "adamw_torch"}
_LORA: Final[dict[str, Any]] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.0}}
_AMP: Final[dict[str, Any]] = {"precision": "amp_bf16"}
_CHECKPOINTED: Final[dict[str, Any]] = {**_COMPILED, "activation_checkpointing": "full"}
_OWN: Final[dict[str, Any]] = {"own_loss": True}
_ONE: Final[dict[str, Any]] = {"micro_batch_size": 1}

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "compiled": _COMPILED,
    "compiled amp_bf16": {**_COMPILED, **_AMP},
    "compiled lora": {**_COMPILED, **_LORA},
    "compiled lora autocast": {**_COMPILED, **_LORA, "autocast": "bf16"},
    "compiled accumulation": {**_COMPILED, "gradient_accumulation_steps": 4},
    "compiled accumulation, short": {
        **_COMPILED, "gradient_accumulation_steps": 2, "micro_batch_size": 1, "seq_len": 130,
    },
    "compiled without grouped heads": _COMPILED,
    "compiled biases": _COMPILED,
    "compiled norms of queries and keys": _COMPILED,
    "compiled short": {**_COMPILED, "micro_batch_size": 1, "seq_len": 130},
    "compiled tied head, short": {**_COMPILED, **_ONE, "seq_len": 300},
    "compiled tied head, short amp_bf16": {**_COMPILED, **_AMP, **_ONE, "seq_len": 300},
    "compiled checkpointed": _CHECKPOINTED,
    "compiled checkpointed amp_bf16": {**_CHECKPOINTED, **_AMP},
    "compiled checkpointed fp32": {**_CHECKPOINTED, "precision": "fp32"},
    "compiled checkpointed reentrant": {
        **_CHECKPOINTED, "activation_checkpointing": "full_reentrant",
    },
    "compiled checkpointed accumulation": {**_CHECKPOINTED, "gradient_accumulation_steps": 4},
    "compiled checkpointed padded": {**_CHECKPOINTED, "padding": True},
    "compiled checkpointed short": {**_CHECKPOINTED, **_ONE, "seq_len": 130},
    "compiled checkpointed tied head, short": {**_CHECKPOINTED, **_ONE, "seq_len": 300},
    "compiled checkpointed tied head, amp_bf16": {**_CHECKPOINTED, **_AMP},
    # Long enough for the mask of all heads in the last layer to be more than the loss.
    "compiled checkpointed long": {**_CHECKPOINTED, **_ONE, "seq_len": 6000},
    "compiled checkpointed long amp_bf16": {**_CHECKPOINTED, **_AMP, **_ONE, "seq_len": 6000},
    "compiled own loss": {**_COMPILED, "loop": _OWN},
    "compiled checkpointed own loss, amp_bf16": {**_CHECKPOINTED, **_AMP, "loop": _OWN},
    "compiled checkpointed own loss, tied head, amp_bf16": {
        **_CHECKPOINTED, **_AMP, "loop": _OWN, "padding": True,
    },
    "compiled checkpointed biases": _CHECKPOINTED,
    "compiled checkpointed norms of queries and keys": _CHECKPOINTED,
    "compiled checkpointed norms of queries and keys, amp_bf16": {**_CHECKPOINTED, **_AMP},
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "compiled without grouped heads": "llama-mha",
    "compiled biases": "qwen2",
    "compiled norms of queries and keys": "qwen3",
    "compiled tied head, short": "llama-tied",
    "compiled tied head, short amp_bf16": "llama-tied",
    "compiled checkpointed tied head, short": "llama-tied",
    "compiled checkpointed tied head, amp_bf16": "llama-tied",
    "compiled checkpointed own loss, tied head, amp_bf16": "llama-tied",
    "compiled checkpointed long": "llama-mha",
    "compiled checkpointed long amp_bf16": "llama-mha",
    "compiled checkpointed biases": "qwen2",
    "compiled checkpointed norms of queries and keys": "qwen3",
    "compiled checkpointed norms of queries and keys, amp_bf16": "qwen3",
}

FAST: Final[frozenset[str]] = frozenset()
