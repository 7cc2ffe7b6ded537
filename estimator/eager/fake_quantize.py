"""Fake quantization as torchao writes it out for QAT: rounded values in full width."""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32, Grads, Operand, Out
from estimator.eager.size import Shape
from estimator.eager.tensor import Node, Tape, Tensor
from estimator.sources import Cite

_FAKE: Final = Cite("torchao", "quantization/quant_primitives.py, _do_fake_quantize_affine")
_CLAMP: Final = Cite("torch-derivatives", "clamp")


def fake_quantize(tape: Tape, x: Operand, groups: Shape) -> Tensor:
    """Return a tensor rounded to integers times a scale, in its own type.

    Everything up to the clamp is fp32, because the scales are; the clamp saves its input. The
    rounded integers live until the result is there. The scales and zero points are attributes of
    the module: they outlive the step, and `Qat` counts them.

    Shapes:
        input over the scale, rounded, with the zero point   as the input, 4 bytes; the last saved
        clamped                                              as the input, 4 bytes
        copy, and less the zero point                        as the input, in its type
        times the scale                                      as the input, 4 bytes
        result                                               as the input, in its type
        inverse of the scales                                [groups]  4 bytes; saved

    Source: torchao, quantization/quant_primitives.py, _quantize_affine_no_dtype_cast and
    _dequantize_affine_no_dtype_check.
    """
    scale = Tensor(tape, groups, F32, None)
    zero = Tensor(tape, groups, DType.INT32, None)
    inverse = [tape.new("inverse of the scales", groups, F32, _FAKE)]
    # Each step is handed the only reference to the one before.
    integers = _clamp(
        ops.add(ops.shift(ops.mul(x, inverse.pop(), "over the scale"), "rounded"), zero, "shifted")
    )
    if x.dtype is F32:
        dequantized = ops.copy(integers, name="copy of the integers")
    else:
        dequantized = ops.cast(integers, x.dtype, "integers in the input's type")
    shifted = [tape.new("zero points in the input's type", groups, x.dtype, _FAKE)]
    dequantized = ops.add(dequantized, shifted[0], "less the zero point")
    shifted.clear()
    dequantized = ops.mul(dequantized, scale, "times the scale")
    return ops.cast(dequantized, x.dtype, "fake quantized")


def _clamp(x: Tensor) -> Tensor:
    """Clamp to a range; saves its input, and backward compares it with both ends."""
    out = x.tape.new("clamped", x.shape, x.dtype, _CLAMP)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        shape = node.meta_of(0)[0]
        masks = [node.scratch(f"mask of the {end} end", shape, DType.BOOL, _CLAMP) for end in _ENDS]
        # One mask takes up the other before the gradient is chosen.
        del masks[1:]
        grad = node.new_grad(0)
        masks.clear()
        return (grad,)

    x.tape.record("clamp", (x,), (x,), rule, out)
    return out


_ENDS: Final = ("lower", "upper")
