"""Operators of fms-acceleration's fused kernels (FOAK), which are Unsloth's of 2024."""

from __future__ import annotations

from typing import Any, Final

from estimator.eager import ops
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import Dim
from estimator.eager.tensor import Node, Param, Tensor, reshaped
from estimator.sources import Cite

_NORM: Final = Cite("fms-foak", "kernels/unsloth/rms_layernorm.py, Fast_RMS_Layernorm")
_LOSS: Final = Cite("fms-foak", "kernels/unsloth/cross_entropy_loss.py, Fast_CrossEntropyLoss")


def rms_norm(x: Tensor, weight: Param, source: Cite = _NORM) -> Tensor:
    """RMSNorm in one kernel; its weight gets no gradient, and backward writes over its input.

    Shapes:
        saved: input    the input's own memory
        saved: 1 / rms  [b, s]  4 bytes

    Source: fms-foak, kernels/unsloth/rms_layernorm.py, Fast_RMS_Layernorm.
    """
    out = x.tape.new("output", x.shape, x.dtype, source)
    inverse = x.tape.new("1 / rms", x.shape[:-1], F32, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        return (reshaped(grad, grad.shape),)

    x.tape.record("rms_norm", (x,), (x, weight, inverse), rule, out)
    return out


class FastLoss:
    """The loss that FOAK registers with transformers: its gradient is written over the logits."""

    def rows(self, spec: Any, tokens: int) -> None:
        """Return None: the logits of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the model's outputs hold."""
        return logits

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss.

        Shapes:
            fp32 copy       [b, s, V]  4 bytes, alive until the function returns
            shifted logits  [b, s, V]  4 bytes, saved; its gradient in backward
            log-sum-exp     [b, s]     4 bytes, saved
            losses          [b, s]     4 bytes

        Source: fms-foak, kernels/unsloth/cross_entropy_loss.py, FastForCausalLMLoss.
        """
        logits = ops.cast(logits, F32, "logits in fp32")
        shifted = ops.copy(ops.narrow(logits, vocab), name="shifted logits")
        tape = logits.tape
        rows = shifted.shape[:-1]
        losses = tape.new("losses", rows, F32, _LOSS)
        lse = tape.new("log-sum-exp", rows, F32, _LOSS)

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            return (reshaped(saved[0], saved[0].shape),)

        tape.record("fast loss", (shifted,), (shifted, lse, labels), rule, losses)
        return ops.unary(losses, "sum", keeps="nothing")
