"""The table of optimizers: one row each, in one file for each library."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.techniques.optimizers.adam_mini import ADAM_MINI
from estimator.techniques.optimizers.apollo import APOLLO
from estimator.techniques.optimizers.bitsandbytes import BITSANDBYTES
from estimator.techniques.optimizers.cpu_offload import CPU_OFFLOAD
from estimator.techniques.optimizers.galore_variants import GALORE_VARIANTS
from estimator.techniques.optimizers.lomo import LOMO
from estimator.techniques.optimizers.low_rank import LOW_RANK
from estimator.techniques.optimizers.lowmem import LOWMEM
from estimator.techniques.optimizers.muon import MUON
from estimator.techniques.optimizers.pytorch_optimizer import PYTORCH_OPTIMIZER
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, trained
from estimator.techniques.optimizers.small_libraries import SMALL_LIBRARIES
from estimator.techniques.optimizers.sophia import SOPHIA
from estimator.techniques.optimizers.temporaries import Step, trainer_groups, worst_moment
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
    **GALORE_VARIANTS,
    **APOLLO,
    **SMALL_LIBRARIES,
    **PYTORCH_OPTIMIZER,
    **ADAM_MINI,
    **SOPHIA,
    **TORCHAO,
    **CPU_OFFLOAD,
}

# Names that `TrainingArguments.optim` knows and we do not answer, and what to use instead.
REFUSED: Final[dict[str, str]] = {
    "adamw_torch_xla": "it runs on XLA devices only; use 'adamw_torch_fused'",
    "adamw_torch_npu_fused": "it runs on NPUs only; use 'adamw_torch_fused'",
    "adamw_anyprecision": "torchdistx is no longer released; use 'adamw' with bf16 weights",
    "deepspeed_cpu_adam": "DeepSpeed's optimizer in host memory comes with ZeRO-Offload, which "
    "belongs to sharding and is not described yet; use 'torchao_cpu_offload', or "
    "'paged_adamw_8bit', whose states the driver moves",
    "sophiah": "its estimate of the Hessian is a product with it, which needs a backward pass "
    "through the backward pass; use 'sophia', which is SophiaG",
    "scalable_shampoo": "its preconditioners are in blocks, and its iteration stops by values; use "
    "'soap' or 'shampoo'",
    "distributed_shampoo": "its preconditioners are in blocks, which is not described yet; use "
    "'soap' or 'shampoo'",
    "lamb_8bit": "bitsandbytes has no 8-bit kernel for LAMB; use 'lamb_32bit'",
    "lars_8bit": "bitsandbytes has no 8-bit kernel for LARS; use 'lars_32bit'",
    "galore_adafactor_layerwise": "the Trainer of transformers 5.23 gives it a learning "
    "rate beside relative steps, which galore-torch refuses; use 'galore_adafactor'",
    "q_galore_adamw_8bit": "q-galore-torch 1.0 reads a setting that bitsandbytes 0.50 no longer "
    "has, and does not ship the layer of its int8 weights; use 'galore_adamw_8bit'",
}


def states(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return what the optimizer keeps with these knobs."""
    kept = OPTIMIZERS[choice.name].states
    return tuple(
        state for state in (kept(choice) if callable(kept) else kept) if state.when(choice)
    )


def temporaries(choice: OptimizerChoice, tensors: tuple[Trained, ...]) -> tuple[int, ...]:
    """Return the sizes of what its step holds beside the states at its worst moment [bytes]."""
    return _step(choice, tensors).worst


def spent_gradients(choice: OptimizerChoice, tensors: tuple[Trained, ...]) -> dict[Trained, int]:
    """Return how many gradients of each tensor its step has dropped by its worst moment."""
    if not OPTIMIZERS[choice.name].spends_gradients:
        return {}
    return _step(choice, tensors).worst_spent


def _step(choice: OptimizerChoice, tensors: tuple[Trained, ...]) -> Step:
    row = OPTIMIZERS[choice.name]
    groups = (tensors,) if row.groups_itself or choice.of_blocks else trainer_groups(tensors)
    return worst_moment(row.updates[choice.implementation], groups, choice)


__all__ = [
    "OPTIMIZERS",
    "OptimizerRow",
    "State",
    "Trained",
    "spent_gradients",
    "states",
    "temporaries",
    "trained",
]
