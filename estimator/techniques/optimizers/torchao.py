"""The low-bit AdamW of torchao: codes and scales in place of moments, a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from estimator.run import Block, OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained, same
from estimator.techniques.optimizers.temporaries import nothing

# Below the smallest size, or off the block, states are plain.
SMALLEST: Final = 4096
_BASE: Final = Cite("torchao", "optim/adam.py, _AdamBase._new_buffer")

Bytes = Callable[[Trained], int]
States = tuple[State, ...] | Callable[[OptimizerChoice], tuple[State, ...]]


def _states(source: Cite, block: Block, bits: int, levels: int) -> tuple[State, ...]:
    """Return the codes, scales and code books of both moments; every moment has its own.

    Shapes, of n values in a moment that is not plain:
        codes  [n]                 `bits` bits each
        scale  [n / block]         4 bytes
        qmap   [levels]            4 bytes

    Source: torchao, optim/adam.py, _AdamBase._new_buffer.
    """

    def is_low_bit(each: Trained) -> bool:
        return each.elements >= SMALLEST and each.elements % block.values == 0

    def codes(each: Trained) -> int:
        return each.elements * bits // 8 if is_low_bit(each) else each.bytes

    def scale(each: Trained) -> int:
        return each.elements // block.values * FP32 if is_low_bit(each) else 0

    def qmap(each: Trained) -> int:
        return levels * FP32 if is_low_bit(each) else 0

    parts: list[tuple[str, Bytes, Cite]]
    parts = [("codes", codes, source), ("scale", scale, block.source or source)]
    if levels:
        parts.append(("qmap", qmap, source))
    return tuple(
        State(f"{name}.{part}", size, cite)
        for name in ("exp_avg", "exp_avg_sq")
        for part, size, cite in parts
    )


def _row(file: str, bits: int, levels: int) -> OptimizerRow:
    source = Cite("torchao", f"optim/{file}, zeros")

    def states(choice: OptimizerChoice) -> tuple[State, ...]:
        low_bit = choice.low_bit
        block = low_bit.torchao_4bit if bits == 4 else low_bit.torchao_8bit
        return _states(source, block, bits, levels)

    return _compiled(states)


def _plain() -> OptimizerRow:
    """Return torchao's AdamW without codes: both moments in the type of the weight."""
    source = Cite("torchao", "optim/adam.py, _AdamW")
    return _compiled((State("exp_avg", same, source), State("exp_avg_sq", same, source)))


def _compiled(states: States) -> OptimizerRow:
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
