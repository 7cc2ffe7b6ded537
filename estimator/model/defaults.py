"""What transformers fills in where a `config.json` leaves an optional field out.

One row for each `model_type`; a test compares every value with the configuration class.
Source: hf-modeling, the configuration classes.
"""

from __future__ import annotations

from typing import Any, Final

DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"tie_word_embeddings": False, "num_key_value_heads": 32},
    "qwen3": {"tie_word_embeddings": False, "num_key_value_heads": 32, "head_dim": 128},
}
