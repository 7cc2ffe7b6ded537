"""A linear layer whose products Transformer Engine makes in 8-bit floats, with delayed scales.

Its kernels multiply rows by rows only, so a factor that two products need is written twice: as it
lies, and transposed.
"""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager.ops import F32
from estimator.eager.size import ONE, Dim
from estimator.eager.tensor import Node, Param, Tensor, reshaped
from estimator.sources import Cite

_QUANTIZE: Final = Cite("transformer-engine", "csrc/quantizer.cpp, Float8Quantizer::create_tensor")
_LINEAR: Final = Cite("transformer-engine", "module/linear.py, _linear_forward_impl")
_BACKWARD: Final = Cite("transformer-engine", "module/linear.py, _linear_backward")
EIGHT: Final = DType.FLOAT8_E4M3


def linear(x: Tensor, weight: Param, out_dim: Dim, gradient: DType) -> Tensor:
    """`x W^T`; saves x transposed and W both ways, in 8 bits.

    The 8-bit weight is made anew for every micro-batch, because nobody says which is the first.
    Under autocast nothing is cast beside: 8 bits are made of what comes, and the output has the
    type of autocast. A step that records no graph makes nothing transposed.

    Shapes:
        input                 [b, s, in]    1 byte, until the output is there
        input, transposed     [in, b, s]    1 byte, saved
        weight                [out, in]     1 byte, saved
        weight, transposed    [in, out]     1 byte, saved
        scales of both        [1]           4 bytes, saved
        output                [b, s, out]   as autocast, else as the input

    Args:
        gradient: the 8-bit type of the gradient of the output.

    Source: transformer-engine, module/linear.py, _linear_forward_impl; csrc/quantizer.cpp,
    Float8Quantizer::create_tensor.
    """
    tape = x.tape
    kind = x.dtype
    if tape.autocast is not None and tape.autocast_enabled:
        kind = tape.autocast
    turns = tape.recording and tape.trains
    scales = [tape.new("scale of the input", (ONE,), F32, _QUANTIZE)]
    rows = [tape.new("input in 8 bits", x.shape, EIGHT, _QUANTIZE)]
    kept: list[Tensor] = []
    if turns:
        kept.append(tape.new("input in 8 bits, transposed", x.shape, EIGHT, _QUANTIZE))
    scales.append(tape.new("scale of the weight", (ONE,), F32, _QUANTIZE))
    kept.append(tape.new("weight in 8 bits", weight.shape, EIGHT, _QUANTIZE))
    if turns and x.requires_grad:
        kept.append(tape.new("weight in 8 bits, transposed", weight.shape, EIGHT, _QUANTIZE))
    out = tape.new("output", (*x.shape[:-1], out_dim), kind, _LINEAR)
    rows.clear()

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        assert grad is not None
        return _backward(node, grad, saved, kind, gradient)

    tape.record("linear", (x, weight), (*kept, *scales), rule, out)
    return out


def _backward(
    node: Node, grad: Tensor, saved: list[Any], kind: DType, gradient: DType
) -> tuple[Tensor | None, ...]:
    """Return both gradients in the type of the output; the input is let go of after the second.

    Shapes:
        gradient of the output                [b, s, out]   1 byte
        gradient of the output, transposed    [out, b, s]   1 byte

    Source: transformer-engine, module/linear.py, _linear_backward.
    """
    held = [
        node.scratch("scale of the gradient", (ONE,), F32, _QUANTIZE),
        node.scratch("gradient in 8 bits", grad.shape, gradient, _QUANTIZE),
        node.scratch("gradient in 8 bits, transposed", grad.shape, gradient, _QUANTIZE),
    ]
    into_x = node.new_grad(0, dtype=kind, source=_BACKWARD) if node.wants(0) else None
    into_weight = node.new_grad(1, dtype=kind, source=_BACKWARD)
    held.clear()
    # What the library frees itself, before autograd casts the gradients.
    saved[0] = node.saved[0] = None
    return None if into_x is None else reshaped(into_x, into_x.shape), into_weight
