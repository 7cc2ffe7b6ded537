"""The low-bit AdamW of torchao: codes and scales in place of moments, a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained, same
from estimator.techniques.optimizers.temporaries import nothing

# The Trainer's block for both; below the smallest size, or off the block, states are plain.
BLOCK: Final = 256
SMALLEST: Final = 4096
_BASE: Final = Cite("torchao", "optim/adam.py, _AdamBase._new_buffer")


def _is_low_bit(each: Trained) -> bool:
    return each.elements >= SMALLEST and each.elements % BLOCK == 0


def _moment(bits: int) -> Callable[[Trained], int]:
    """Return the bytes of the codes of one moment, or of a plain one in the type of the weight.

    Source: torchao, optim/adam.py, _AdamBase._new_buffer.
    """

    def moment(each: Trained) -> int:
        return each.elements * bits // 8 if _is_low_bit(each) else each.bytes

    return moment


def _scale(each: Trained) -> int:
    """Bytes of a moment's scales: fp32 for each block."""
    return each.elements // BLOCK * FP32 if _is_low_bit(each) else 0


def _qmap(levels: int) -> Callable[[Trained], int]:
    """Return the bytes of a moment's code book, of which every moment has its own."""

    def qmap(each: Trained) -> int:
        return levels * FP32 if _is_low_bit(each) else 0

    return qmap


def _row(file: str, bits: int, levels: int) -> OptimizerRow:
    source = Cite("torchao", f"optim/{file}, zeros")
    states = [
        State(f"{name}.{part}", size, source)
        for name in ("exp_avg", "exp_avg_sq")
        for part, size in (("codes", _moment(bits)), ("scale", _scale), ("qmap", _qmap(levels)))
        if part != "qmap" or levels
    ]
    return _compiled(tuple(states))


def _plain() -> OptimizerRow:
    """Return torchao's AdamW without codes: both moments in the type of the weight."""
    source = Cite("torchao", "optim/adam.py, _AdamW")
    return _compiled((State("exp_avg", same, source), State("exp_avg_sq", same, source)))


def _compiled(states: tuple[State, ...]) -> OptimizerRow:
    """Return a row with torchao's step, which may round bf16 weights at random.

    The random numbers and the bits of the update are values inside the compiled step.

    Source: torchao, optim/adam.py, single_param_adam.
    """
    knobs = ("bf16_stochastic_round",)
    return OptimizerRow(states, {"fused": nothing}, "fused", _BASE, knobs=knobs, note=_NOTE)


_NOTE: Final = (
    "the step of torchao's optimizers is compiled by inductor for each shape; what its kernels "
    "hold beside the states, random numbers for stochastic rounding included, is not counted"
)


TORCHAO: Final[dict[str, OptimizerRow]] = {
    "torchao_adamw": _plain(),
    "adamw_torch_8bit": _row("subclass_8bit.py, OptimState8bit", 8, 256),
    "adamw_torch_4bit": _row("subclass_4bit.py, OptimState4bit", 4, 16),
    "adamw_torch_fp8": _row("subclass_fp8.py, OptimStateFp8", 8, 0),
}
