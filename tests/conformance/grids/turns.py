"""Training that takes turns: a few layers, or one block, at a time."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}


def _lisa(*others: Document, **knobs: Any) -> Document:
    document: Document = {"method": {"name": "lisa", **knobs}}
    for other in others:
        document.update(other)
    return document


RECIPES: Final[dict[str, Document]] = {
    "lisa": _lisa(),
    "lisa checkpointed": _lisa(CHECKPOINTED),
    "lisa short, tied": _lisa(SHORT),
    "lisa rebuilt": _lisa(keep_states=False),
    "lisa rebuilt short checkpointed, gpt2": _lisa(SHORT, CHECKPOINTED, keep_states=False),
    "lisa amp short foreach": _lisa(
        SHORT,
        {"precision": "amp_bf16", "optimizer": {"name": "adamw", "implementation": "foreach"}},
        activated_layers=1,
    ),
    "lisa 8-bit short": _lisa(SHORT, {"optimizer": "adamw_8bit"}),
    "lisa adafactor fp32": _lisa(SHORT, {"precision": "fp32", "optimizer": "adafactor"}),
    "lisa accumulated padded": _lisa({"gradient_accumulation_steps": 4, "padding": True}),
    "lisa, alternating": _lisa(activated_layers=3),
}

MODELS: Final[dict[str, str]] = {
    "lisa short, tied": "llama-tied",
    "lisa rebuilt short checkpointed, gpt2": "gpt2",
    "lisa, alternating": "gemma3",
}

FAST: Final = frozenset({"lisa short, tied"})
