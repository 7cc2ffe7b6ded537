"""Grids by kind of technique: each module names its recipes, and which of them every run covers.

A grid has `RECIPES` (name: changes of the request), `MODELS` (name of a recipe: the model that it
runs on, `llama` where nothing is said), and `FAST` (names of the recipes for every test run).
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from tests.conformance.grids import (
    bases,
    combined,
    compiled,
    execution,
    fp8,
    loop,
    lora,
    loss,
    low_rank,
    methods,
    optimizers,
    peft,
    peft_adapters,
    qat,
    quantization,
    software,
    turns,
    unsloth,
)


class Grid(Protocol):
    """What a module of this folder holds."""

    RECIPES: dict[str, dict[str, Any]]
    MODELS: dict[str, str]
    FAST: frozenset[str]


GRIDS: Final[tuple[Grid, ...]] = (
    bases,
    combined,
    compiled,
    execution,
    fp8,
    loop,
    lora,
    loss,
    low_rank,
    methods,
    optimizers,
    peft,
    peft_adapters,
    qat,
    quantization,
    software,
    turns,
    unsloth,
)
