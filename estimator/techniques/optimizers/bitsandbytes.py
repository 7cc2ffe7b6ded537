"""The optimizers of bitsandbytes: 8-bit and 32-bit states, in device or in paged memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from estimator.dtypes import DType
from estimator.run import Block, OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import (
    FP32,
    OptimizerRow,
    State,
    Trained,
    in_fp32,
    scalar,
    updates_any,
)
from estimator.techniques.optimizers.temporaries import Step, in_turn, nothing

SMALLEST_8BIT: Final = 4096
SMALLEST_PAGED: Final = 100_000
_ONE: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer1State.init_state")
_TWO: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer2State.init_state")
_ADEMAMIX: Final = Cite("bitsandbytes", "optim/ademamix.py, AdEMAMix.init_state")

Bytes = Callable[[Trained], int]


def _is_8bit(each: Trained) -> bool:
    return each.elements >= SMALLEST_8BIT and not each.keeps_32bit


def _eight_bit(each: Trained) -> int:
    """Bytes of one moment: 1 byte for each value, or fp32 for small tensors.

    HF's Trainer keeps 32-bit states for every embedding; a loop of one's own does not.

    Source: dettmers2022, section 2.1; bitsandbytes, optim/optimizer.py,
    Optimizer2State.init_state; hf-trainer, Trainer.create_optimizer.
    """
    return each.elements if _is_8bit(each) else each.elements * FP32


def _absmax(block: int) -> Bytes:
    """Return the bytes of a moment's scales: fp32 for each block of values; never paged.

    Source: bitsandbytes, optim/optimizer.py, Optimizer2State.init_state.
    """
    return lambda each: -(-each.elements // block) * FP32 if _is_8bit(each) else 0


def _twice(size: Bytes) -> Bytes:
    """Return the bytes of AdEMAMix's two first moments, which are one tensor."""
    return lambda each: 2 * size(each)


def _is_paged(each: Trained) -> bool:
    return each.elements >= SMALLEST_PAGED


def _is_not_paged(each: Trained) -> bool:
    return False


def _param_norm(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`torch.norm(p.data.float())`, to clip the update by it; the kernel works in place.

    Source: bitsandbytes, functional.py, optimizer_update_32bit.
    """
    for each in in_turn(tensors, step):
        if each.dtype.is_half:
            step.fp32(each)


def _no_bf16(bits: int) -> Callable[[Trained], str]:
    """Return why a tensor cannot be updated: three kernels over fp32 states know no bf16.

    Source: bitsandbytes, backends/cuda/ops.py, str2optimizer32bit.
    """

    def reason(each: Trained) -> str:
        state_32bit = bits == 32 or not _is_8bit(each)
        if each.dtype is not DType.BFLOAT16 or not state_32bit:
            return ""
        return (
            f"{each.name} is bf16 with 32-bit states, for which bitsandbytes has no kernel of this "
            "optimizer; use precision 'fp16', 'fp32' or 'amp_bf16'"
        )

    return reason


def _row(
    source: Cite,
    *,
    bits: int,
    paged: bool = False,
    needs: tuple[str, ...] = (),
    clips_update: bool = False,
    without_bf16: bool = False,
) -> OptimizerRow:
    """Return the row of an optimizer with one moment, two, or AdEMAMix's three.

    One that clips its update (`max_unorm`) keeps the norm of each.
    """
    size = _eight_bit if bits == 8 else in_fp32  # as `optim_bits` is written
    managed = _is_paged if paged else _is_not_paged
    first = _twice(size) if source is _ADEMAMIX else size

    def scales(block: Block) -> list[State]:
        cite = block.source or source
        one = _absmax(block.values)
        both = [State("absmax1", _twice(one) if source is _ADEMAMIX else one, cite)]
        if source is not _ONE:
            both.append(State("absmax2", one, cite))
        return both

    def states(choice: OptimizerChoice) -> tuple[State, ...]:
        kept = [State("state1", first, source, managed=managed)]
        if source is not _ONE:
            kept.append(State("state2", size, source, managed=managed))
        if size is _eight_bit:
            kept += scales(choice.low_bit.bitsandbytes)
        if clips_update:
            kept.append(State("unorm_vec", scalar, source))
        return tuple(kept)

    return OptimizerRow(
        states,
        {"fused": _param_norm if clips_update else nothing},
        "fused",
        source,
        knobs=needs,
        needs=needs,
        refuses=_no_bf16(bits) if without_bf16 else updates_any,
    )


BITSANDBYTES: Final[dict[str, OptimizerRow]] = {
    "adamw_8bit": _row(_TWO, bits=8),
    "adamw_32bit": _row(_TWO, bits=32),
    "paged_adamw_8bit": _row(_TWO, bits=8, paged=True),
    "paged_adamw_32bit": _row(_TWO, bits=32, paged=True),
    "ademamix": _row(_ADEMAMIX, bits=32),
    "ademamix_8bit": _row(_ADEMAMIX, bits=8),
    "paged_ademamix_8bit": _row(_ADEMAMIX, bits=8, paged=True),
    "paged_ademamix_32bit": _row(_ADEMAMIX, bits=32, paged=True),
    "lion_8bit": _row(_ONE, bits=8),
    "lion_32bit": _row(_ONE, bits=32),
    "paged_lion_8bit": _row(_ONE, bits=8, paged=True),
    "paged_lion_32bit": _row(_ONE, bits=32, paged=True),
    "rmsprop_bnb_8bit": _row(_ONE, bits=8, without_bf16=True),
    "rmsprop_bnb_32bit": _row(_ONE, bits=32, without_bf16=True),
    "adagrad_8bit": _row(_ONE, bits=8, without_bf16=True),
    "adagrad_32bit": _row(_ONE, bits=32, without_bf16=True),
    "lamb_32bit": _row(_TWO, bits=32, clips_update=True),
    "lars_32bit": _row(_ONE, bits=32, needs=("momentum",), clips_update=True, without_bf16=True),
    "sgd_8bit": _row(_ONE, bits=8, needs=("momentum",), without_bf16=True),
    "sgd_32bit": _row(_ONE, bits=32, needs=("momentum",), without_bf16=True),
}
