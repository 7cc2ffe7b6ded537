"""The Trainer's label smoothing: a loss that is made of the model's outputs, outside the model."""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, ONE, SEQ, Dim, Shape
from estimator.eager.tensor import Node, Tensor, reshaped
from estimator.model.spec import ModelSpec
from estimator.sources import Cite

_SMOOTHER: Final = Cite("hf-trainer-pt-utils", "LabelSmoother.__call__")
_POSITIONS: Final[Shape] = (BATCH, SEQ, ONE)


class LabelSmoothing:
    """Cross entropy and mean log-probability, in the type of the outputs' logits.

    Source: hf-trainer-pt-utils, LabelSmoother.__call__; hf-trainer, Trainer.compute_loss.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> None:
        """Return None: the logits of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the model's outputs hold."""
        return logits

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss; every local name lives until the function returns.

        Shapes:
            shifted logits          [b, s, V]  width of the outputs' logits; really s - 1 positions
            log-softmax             [b, s, V]  likewise, saved
            log-softmax, negative   [b, s, V]  likewise
        """
        tape = logits.tape
        logits = ops.copy(ops.part(logits, logits.shape), name="shifted logits")
        shifted = tape.new("shifted labels", (BATCH, SEQ), DType.INT64, _SMOOTHER)
        log_probs = ops.neg(ops.log_softmax(logits))
        counted = tape.new("labels that are padding", _POSITIONS, DType.BOOL, _SMOOTHER)
        clamped = tape.new("labels of at least 0", _POSITIONS, DType.INT64, _SMOOTHER)
        del shifted
        nll = _gather(log_probs, clamped)
        smoothed = _sum(log_probs)
        loss = tape.new("loss", (), F32, _SMOOTHER)
        tape.record("both sums", (nll, smoothed), (), _both, loss)
        del counted
        return loss


def _both(node: Node, grads: Grads, saved: list[Any]) -> Out:
    """Broadcast one number to every position of both losses."""
    return node.new_grad(0), node.new_grad(1)


def _gather(log_probs: Tensor, index: Tensor) -> Tensor:
    """Pick the log-probability of each label; backward scatters into zeros of the full shape.

    The operator saves its input, though backward reads no more of it than its shape.
    """
    source = Cite("torch-derivatives", "gather")
    out = log_probs.tape.new("of the labels", _POSITIONS, log_probs.dtype, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return (node.new_grad(0, source=source),)

    log_probs.tape.record("gather", (log_probs,), (log_probs, index), rule, out)
    return out


def _sum(log_probs: Tensor) -> Tensor:
    """Sum over the vocabulary in fp32; backward broadcasts, and casts what is no fp32."""
    out = log_probs.tape.new("sums", _POSITIONS, F32, Cite("torch-derivatives", "sum.dim_IntList"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        return (reshaped(grad, node.meta_of(0)[0]),)

    log_probs.tape.record("sum", (log_probs,), (), rule, out)
    return out
