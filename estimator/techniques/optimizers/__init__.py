"""The table of optimizers: one row each, in one file for each library."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.techniques.optimizers.adam_mini import ADAM_MINI
from estimator.techniques.optimizers.apollo import APOLLO
from estimator.techniques.optimizers.bitsandbytes import BITSANDBYTES
from estimator.techniques.optimizers.lomo import LOMO
from estimator.techniques.optimizers.low_rank import LOW_RANK
from estimator.techniques.optimizers.lowmem import LOWMEM
from estimator.techniques.optimizers.muon import MUON
from estimator.techniques.optimizers.pytorch_optimizer import PYTORCH_OPTIMIZER
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, trained
from estimator.techniques.optimizers.small_libraries import SMALL_LIBRARIES
from estimator.techniques.optimizers.temporaries import trainer_groups, worst_moment
from estimator.techniques.optimizers.torch_optim import TORCH
from estimator.techniques.optimizers.torchao import TORCHAO
from estimator.techniques.optimizers.transformers import TRANSFORMERS

OPTIMIZERS: Final[dict[str, OptimizerRow]] = {
    **TORCH,
    **MUON,
    **TRANSFORMERS,
    **BITSANDBYTES,
    **LOMO,
    **LOWMEM,
    **LOW_RANK,
    **APOLLO,
    **SMALL_LIBRARIES,
    **PYTORCH_OPTIMIZER,
    **ADAM_MINI,
    **TORCHAO,
}

# Names that `TrainingArguments.optim` knows and we do not answer, and what to use instead.
REFUSED: Final[dict[str, str]] = {
    "adamw_torch_xla": "it runs on XLA devices only; use 'adamw_torch_fused'",
    "adamw_torch_npu_fused": "it runs on NPUs only; use 'adamw_torch_fused'",
    "adamw_anyprecision": "torchdistx is no longer released; use 'adamw' with bf16 weights",
    "galore_adamw_8bit": "no source has been followed yet; use 'adamw_8bit' or method 'lora'",
    "galore_adafactor": "no source has been followed yet; use 'adafactor'",
    "galore_adamw_8bit_layerwise": "no source has been followed yet; use in_backward",
    "galore_adafactor_layerwise": "no source has been followed yet; use in_backward",
    "sophia": "its estimate of the Hessian needs a second backward pass, which is not described "
    "yet; 'adamw' has states of the same size",
    "scalable_shampoo": "its preconditioners are in blocks, and its iteration stops by values; use "
    "'soap' or 'shampoo'",
    "distributed_shampoo": "its preconditioners are in blocks, which is not described yet; use "
    "'soap' or 'shampoo'",
    "lamb_8bit": "bitsandbytes has no 8-bit kernel for LAMB; use 'lamb_32bit'",
    "lars_8bit": "bitsandbytes has no 8-bit kernel for LARS; use 'lars_32bit'",
}


def states(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return what the optimizer keeps with these knobs."""
    kept = OPTIMIZERS[choice.name].states
    return tuple(
        state for state in (kept(choice) if callable(kept) else kept) if state.when(choice)
    )


def temporaries(choice: OptimizerChoice, tensors: tuple[Trained, ...]) -> tuple[int, ...]:
    """Return the sizes of what its step holds beside the states at its worst moment [bytes]."""
    row = OPTIMIZERS[choice.name]
    groups = (tensors,) if row.groups_itself else trainer_groups(tensors)
    return worst_moment(row.updates[choice.implementation], groups, choice)


__all__ = ["OPTIMIZERS", "OptimizerRow", "State", "Trained", "states", "temporaries", "trained"]
