"""The optimizers of bitsandbytes: 8-bit and 32-bit states, in device or in paged memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained, in_fp32
from estimator.techniques.optimizers.temporaries import nothing

EIGHT_BIT_BLOCK: Final = 256
SMALLEST_8BIT: Final = 4096
SMALLEST_PAGED: Final = 100_000
_ONE: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer1State.init_state")
_TWO: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer2State.init_state")
_ADEMAMIX: Final = Cite("bitsandbytes", "optim/ademamix.py, AdEMAMix.init_state")

Bytes = Callable[[Trained], int]


def _is_8bit(each: Trained) -> bool:
    return each.elements >= SMALLEST_8BIT and not each.in_embedding


def _eight_bit(each: Trained) -> int:
    """Bytes of one moment: 1 byte for each value, or fp32 for small tensors.

    HF's Trainer keeps 32-bit states for every embedding.

    Source: dettmers2022, section 2.1; bitsandbytes, optim/optimizer.py,
    Optimizer2State.init_state; hf-trainer, Trainer.create_optimizer.
    """
    return each.elements if _is_8bit(each) else each.elements * FP32


def _absmax(each: Trained) -> int:
    """Bytes of a moment's scales: fp32 for each block of 256 values; they are never paged.

    Source: bitsandbytes, optim/optimizer.py, Optimizer2State.init_state.
    """
    return -(-each.elements // EIGHT_BIT_BLOCK) * FP32 if _is_8bit(each) else 0


def _twice(size: Bytes) -> Bytes:
    """Return the bytes of AdEMAMix's two first moments, which are one tensor."""
    return lambda each: 2 * size(each)


def _is_paged(each: Trained) -> bool:
    return each.elements >= SMALLEST_PAGED


def _is_not_paged(each: Trained) -> bool:
    return False


def _row(
    source: Cite, *, bits: int, paged: bool = False, needs: tuple[str, ...] = ()
) -> OptimizerRow:
    """Return the row of an optimizer with one moment, two, or AdEMAMix's three."""
    size = _eight_bit if bits == 8 else in_fp32  # as `optim_bits` is written
    managed = _is_paged if paged else _is_not_paged
    first = _twice(size) if source is _ADEMAMIX else size
    scales = _twice(_absmax) if source is _ADEMAMIX else _absmax
    states = [State("state1", first, source, managed=managed)]
    if source is not _ONE:
        states.append(State("state2", size, source, managed=managed))
    if size is _eight_bit:
        states.append(State("absmax1", scales, source))
        if source is not _ONE:
            states.append(State("absmax2", _absmax, source))
    return OptimizerRow(
        tuple(states), {"fused": nothing}, "fused", source, knobs=needs, needs=needs
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
    "rmsprop_bnb_8bit": _row(_ONE, bits=8),
    "rmsprop_bnb_32bit": _row(_ONE, bits=32),
    "adagrad_8bit": _row(_ONE, bits=8),
    "adagrad_32bit": _row(_ONE, bits=32),
    "sgd_8bit": _row(_ONE, bits=8, needs=("momentum",)),
    "sgd_32bit": _row(_ONE, bits=32, needs=("momentum",)),
}
