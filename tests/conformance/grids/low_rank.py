"""Optimizers that project gradients to a low rank, alone and in combinations."""

from __future__ import annotations

from typing import Any, Final

from tests.conformance.grids.optimizers import CHECKPOINTED, SHORT

Document = dict[str, Any]

_FP32: Final[Document] = {"precision": "fp32"}


def asked(optimizer: str, *others: Document, **knobs: Any) -> Document:
    """Return the changes of a request that name an optimizer, and others beside them."""
    document: Document = {"optimizer": {"name": optimizer, **knobs}}
    for other in others:
        document.update(other)
    return document


RECIPES: Final[dict[str, Document]] = {
    "galore": asked("galore_adamw", SHORT),
    "galore rank 300, tied": asked("galore_adamw", SHORT, CHECKPOINTED, rank=300),
    "galore fp32, tied": asked("galore_adamw", SHORT, _FP32),
    "galore amp checkpointed": asked(
        "galore_adamw", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}, rank=64
    ),
    "galore layerwise": asked("galore_adamw_layerwise", SHORT),
    "galore layerwise checkpointed, tied": asked("galore_adamw_layerwise", SHORT, CHECKPOINTED),
    "galore 8-bit": asked("galore_adamw_8bit", SHORT),
    "galore 8-bit, wide layers": asked("galore_adamw_8bit", SHORT),
    "galore 8-bit rank 300 accumulated, tied": asked(
        "galore_adamw_8bit", SHORT, {"gradient_accumulation_steps": 2}, rank=300
    ),
    "galore 8-bit amp checkpointed": asked(
        "galore_adamw_8bit", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}, rank=64
    ),
    "galore 8-bit fp32, gpt2": asked("galore_adamw_8bit", SHORT, _FP32),
    "galore 8-bit layerwise": asked("galore_adamw_8bit_layerwise", SHORT),
    "galore adafactor": asked("galore_adafactor", SHORT),
    "galore adafactor rank 300 checkpointed, tied": asked(
        "galore_adafactor", SHORT, CHECKPOINTED, rank=300
    ),
    "galore adafactor fp32, tied": asked("galore_adafactor", SHORT, _FP32),
    "galore adafactor amp accumulated": asked(
        "galore_adafactor", SHORT, {"precision": "amp_bf16", "gradient_accumulation_steps": 2}
    ),
    "galore adafactor in backward": asked("galore_adafactor", SHORT, in_backward=True),
    "galore adafactor, gpt2": asked("galore_adafactor", SHORT),
    "apollo": asked("apollo_adamw", SHORT),
    "apollo-mini": asked("apollo_mini", SHORT),
    "apollo fp32, tied": asked("apollo_adamw", SHORT, _FP32),
    "apollo amp checkpointed rank 64": asked(
        "apollo_adamw", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}, rank=64
    ),
    "apollo of a rank beyond the matrix, gpt2": asked("apollo_adamw", SHORT, rank=1300),
    "apollo, long": asked("apollo_adamw", CHECKPOINTED),
    "apollo accumulated": asked("apollo_adamw", SHORT, {"gradient_accumulation_steps": 2}),
    "apollo layerwise": asked("apollo_adamw_layerwise", SHORT),
    "apollo-mini layerwise checkpointed, tied": asked(
        "apollo_adamw_layerwise", SHORT, CHECKPOINTED, rank=1, scale_type="tensor"
    ),
}

MODELS: Final[dict[str, str]] = {
    "galore rank 300, tied": "llama-tied",
    "galore fp32, tied": "llama-tied",
    "galore layerwise checkpointed, tied": "llama-tied",
    "galore 8-bit, wide layers": "gemma",
    "galore 8-bit rank 300 accumulated, tied": "llama-tied",
    "galore 8-bit fp32, gpt2": "gpt2",
    "galore adafactor rank 300 checkpointed, tied": "llama-tied",
    "galore adafactor fp32, tied": "llama-tied",
    "galore adafactor, gpt2": "gpt2",
    "apollo fp32, tied": "llama-tied",
    "apollo of a rank beyond the matrix, gpt2": "gpt2",
    "apollo-mini layerwise checkpointed, tied": "llama-tied",
}

FAST: Final = frozenset({"apollo"})
