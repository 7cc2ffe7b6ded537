"""Training that takes turns: a few layers, or one block, at a time."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
# So few that the optimizer's step is the peak.
FEW: Final[Document] = {"micro_batch_size": 1, "seq_len": 16}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}


def _lisa(*others: Document, **knobs: Any) -> Document:
    document: Document = {"method": {"name": "lisa", **knobs}}
    for other in others:
        document.update(other)
    return document


def _badam(*others: Document) -> Document:
    document: Document = {"method": "badam"}
    for other in others:
        document.update(other)
    return document


def _optimizer(name: str, **knobs: Any) -> Document:
    return {"optimizer": {"name": name, **knobs}}


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
    "badam": _badam(),
    "badam checkpointed": _badam(CHECKPOINTED),
    "badam short": _badam(SHORT),
    "badam short foreach, wide": _badam(SHORT, _optimizer("adamw", implementation="foreach")),
    "badam short fp16 single, tied": _badam(
        SHORT, {"precision": "fp16"}, _optimizer("adam", implementation="single")
    ),
    "badam autocast accumulated, opt": _badam(
        {"autocast": "bf16", "gradient_accumulation_steps": 4}
    ),
    "badam few tokens": _badam(FEW),
    "badam few tokens foreach, tied": _badam(FEW, _optimizer("adamw", implementation="foreach")),
    "badam few tokens accumulated": _badam(FEW, {"gradient_accumulation_steps": 2}),
    "badam sgd, gpt_neox": _badam(SHORT, _optimizer("sgd", momentum=0.9)),
    "badam padded, alternating": _badam({"padding": True}),
    "full master_bf16 accumulated": {
        **SHORT,
        "precision": "master_bf16",
        "gradient_accumulation_steps": 2,
    },
}

MODELS: Final[dict[str, str]] = {
    "lisa short, tied": "llama-tied",
    "lisa rebuilt short checkpointed, gpt2": "gpt2",
    "lisa, alternating": "gemma3",
    "badam short foreach, wide": "qwen2",
    "badam few tokens foreach, tied": "llama-tied",
    "badam short fp16 single, tied": "llama-tied",
    "badam autocast accumulated, opt": "opt",
    "badam sgd, gpt_neox": "gpt_neox",
    "badam padded, alternating": "gemma3",
}

FAST: Final = frozenset({"lisa short, tied", "badam few tokens"})
