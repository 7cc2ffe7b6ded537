"""Models that torch.compile compiles whole: inductor's own code around kernels that do nothing.

Slow for a grid: every layer is compiled. So no case is a part of every test run; one small model is
compared in tests/profiler/test_inductor.py.
"""

from __future__ import annotations

from typing import Any, Final

_COMPILED: Final[dict[str, Any]] = {"kernels": ["compile"], "optimizer": "adamw_torch"}
_LORA: Final[dict[str, Any]] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.0}}
_AMP: Final[dict[str, Any]] = {"precision": "amp_bf16"}

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
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "compiled without grouped heads": "llama-mha",
    "compiled biases": "qwen2",
    "compiled norms of queries and keys": "qwen3",
}

FAST: Final[frozenset[str]] = frozenset()
