"""What one project's script does: its optimizer, alone and in the recipe that it is known for."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LOWMEM: Final[Document] = {"optimizer": {"name": "lowmem_adafactor", "in_backward": True}}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}

RECIPES: Final[dict[str, Document]] = {
    "lowmem adafactor": {**SHORT, "optimizer": "lowmem_adafactor"},
    "lowmem adafactor fp32": {**SHORT, "optimizer": "lowmem_adafactor", "precision": "fp32"},
    "lowmem adafactor in backward": {**SHORT, **LOWMEM},
    "lowmem recipe": {
        **LOWMEM,
        "method": {"name": "partial", "last_layers": 5},
        "autocast": "bf16",
        "padding": True,
        "activation_checkpointing": "full",
        "loss": "cut_cross_entropy",
    },
    "lowmem adafactor, gpt2": {**SHORT, **LOWMEM, "activation_checkpointing": "full"},
}
MODELS: Final[dict[str, str]] = {"lowmem adafactor, gpt2": "gpt2"}
FAST: Final = frozenset({"lowmem adafactor in backward"})
