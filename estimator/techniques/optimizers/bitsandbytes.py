"""The optimizers of bitsandbytes: 8-bit and 32-bit states, in device or in paged memory."""

from __future__ import annotations

from typing import Final

from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained
from estimator.techniques.optimizers.temporaries import nothing

EIGHT_BIT_BLOCK: Final = 256
SMALLEST_8BIT: Final = 4096
SMALLEST_PAGED: Final = 100_000
_TWO: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer2State.init_state")


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


def _is_paged(each: Trained) -> bool:
    return each.elements >= SMALLEST_PAGED


def _eight_bit_states(*, paged: bool) -> tuple[State, ...]:
    managed = _is_paged if paged else (lambda _: False)
    values = (State(name, _eight_bit, _TWO, managed=managed) for name in ("state1", "state2"))
    return (*values, State("absmax1", _absmax, _TWO), State("absmax2", _absmax, _TWO))


BITSANDBYTES: Final[dict[str, OptimizerRow]] = {
    "adamw_8bit": OptimizerRow(_eight_bit_states(paged=False), {"fused": nothing}, "fused", _TWO),
    "paged_adamw_8bit": OptimizerRow(
        _eight_bit_states(paged=True), {"fused": nothing}, "fused", _TWO
    ),
}
