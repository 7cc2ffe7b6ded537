"""The loss of a hand-written loop: made of the model's logits, outside the model and autocast."""

from __future__ import annotations

from estimator.eager import ops
from estimator.eager.size import BATCH, SHIFTED, Dim
from estimator.eager.tensor import Tensor, view
from estimator.model.spec import ModelSpec


class OutsideLoss:
    """Cross entropy over a shifted copy, in the type in which the model hands its logits out.

    The loop's names for the logits and for the copy live until it binds them anew in the next
    step, through the optimizer's step and the next forward pass.

    Source: torch-derivatives, _log_softmax.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> None:
        """Return None: the logits of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the model hands out."""
        return logits

    def shifted(self, logits: Tensor) -> Tensor:
        """Return `logits[:, :-1].contiguous()`.

        Shapes:
            shifted logits  [b, s-1, V]  width of the logits
        """
        shape = (BATCH, SHIFTED, logits.shape[-1])
        return ops.copy(ops.part(logits, shape), name="shifted logits")

    def __call__(self, shifted: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss.

        Shapes:
            log-softmax  [b, s-1, V]  width of the logits, saved
        """
        flat = view(shifted, (BATCH, SHIFTED, vocab))
        return ops.nll_loss(ops.log_softmax(flat), labels)
