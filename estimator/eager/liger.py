"""Operators of Liger: what the autograd functions around its kernels keep and allocate."""

from __future__ import annotations

from typing import Any, Final

from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import Shape, dim
from estimator.eager.tensor import Node, Param, Tensor, reshaped
from estimator.sources import Assumption, Cite

_NORM: Final = Cite("liger", "ops/rms_norm.py, rms_norm_forward")
_GATED: Final = Cite("liger", "ops/swiglu.py, swiglu_forward; ops/geglu.py, geglu_forward")
_MULTIPROCESSORS: Final = dim("multiprocessors", 108)
_PARTIAL: Final = Assumption(
    "one row for each multiprocessor of an A100, 108 (liger: ops/rms_norm.py, rms_norm_backward)"
)


def rms_norm(x: Tensor, weight: Param, *, in_place: bool) -> Tensor:
    """RMSNorm in one kernel; saves its input and one number for each row.

    Shapes:
        saved: input            the input's own memory
        saved: 1 / rms          [b, s]  4 bytes
        backward: partial sums  [multiprocessors, h]  4 bytes, if the weight is trained

    Args:
        in_place: backward writes the gradient of the input over that of the output.

    Source: liger, ops/rms_norm.py, rms_norm_forward and rms_norm_backward.
    """
    tape = x.tape
    out = tape.new("output", x.shape, x.dtype, _NORM)
    rstd = tape.new("1 / rms", x.shape[:-1], F32, _NORM)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        width: Shape = node.meta_of(0)[0][-1:]
        partial = None
        if node.wants(1):
            partial = node.scratch("partial sums", (_MULTIPROCESSORS, *width), F32, _PARTIAL)
        into_x = reshaped(grad, grad.shape) if in_place else node.new_grad(0, source=_NORM)
        if not node.wants(1):
            return into_x, None
        summed = node.new_grad(1, dtype=F32, source=_NORM)
        del partial
        same = node.meta_of(1)[1] is F32
        return into_x, summed if same else node.new_grad(1, source=_NORM)

    tape.record("rms_norm", (x, weight), (x, weight, rstd), rule, out)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions written over queries and keys, and in backward over their gradients.

    Source: liger, ops/rope.py, rope_forward and rope_backward.
    """
    outs = tuple(
        Tensor(each.tape, each.shape, each.dtype, each.storage, base=each.base or each)
        for each in (q, k)
    )

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return tuple(None if each is None else reshaped(each, each.shape) for each in grads)

    q.tape.record("rope", (q, k), (cos, sin), rule, *outs)
    return outs[0], outs[1]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU or GeGLU in one kernel; backward writes both gradients over what was saved.

    Shapes:
        saved: gate, up  [b, s, f]  their own memory
        output           [b, s, f]

    Source: liger, ops/swiglu.py, LigerSiLUMulFunction; ops/geglu.py, LigerGELUMulFunction.
    """
    out = gate.tape.new("gated product", gate.shape, gate.dtype, _GATED)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return tuple(reshaped(each, each.shape) for each in saved)

    gate.tape.record("gated product", (gate, up), (gate, up), rule, out)
    return out
