"""The parts that memory is divided into, and what a number rests on; one word for each."""

from __future__ import annotations

from typing import Final, Literal

Component = Literal[
    "weights", "gradients", "optimizer_states", "activations", "buffers", "workspace", "runtime"
]
COMPONENTS: Final[tuple[Component, ...]] = (
    "weights", "gradients", "optimizer_states", "activations", "buffers", "workspace", "runtime",
)  # fmt: skip
Basis = Literal["formula", "measured", "assumed"]
