"""The table of optimizers: one row each, in one file for each library."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.techniques.optimizers.bitsandbytes import BITSANDBYTES
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, trained
from estimator.techniques.optimizers.temporaries import worst_moment
from estimator.techniques.optimizers.torch_optim import TORCH
from estimator.techniques.optimizers.transformers import TRANSFORMERS

OPTIMIZERS: Final[dict[str, OptimizerRow]] = {**TORCH, **TRANSFORMERS, **BITSANDBYTES}


def states(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return what the optimizer keeps with these knobs."""
    return tuple(state for state in OPTIMIZERS[choice.name].states if state.when(choice))


def temporaries(choice: OptimizerChoice, tensors: tuple[Trained, ...]) -> tuple[int, ...]:
    """Return the sizes of what its step holds beside the states at its worst moment [bytes]."""
    update = OPTIMIZERS[choice.name].updates[choice.implementation]
    return worst_moment(update, tensors, choice)


__all__ = ["OPTIMIZERS", "OptimizerRow", "State", "Trained", "states", "temporaries", "trained"]
