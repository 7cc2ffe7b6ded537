"""The loss of SophiaG's estimate of the Hessian: labels are drawn from the model's own logits."""

from __future__ import annotations

from typing import Final

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import Grads, Out
from estimator.eager.size import BATCH, ONE, SEQ
from estimator.eager.tensor import Node, Tensor
from estimator.model.spec import ModelSpec
from estimator.sources import Cite

_CATEGORICAL: Final = Cite("torch-categorical", "Categorical.__init__")
_SAMPLE: Final = Cite("torch-categorical", "Categorical.sample")
_MULTINOMIAL: Final = Cite("torch-multinomial", "multinomial_out, one sample is drawn")
_LOGSUMEXP: Final = Cite("torch-logsumexp", "logsumexp_out_impl")


class SampledLabels:
    """Cross entropy with labels of a Categorical distribution, in the type of the outputs' logits.

    The model is called without labels, and returns before any of this begins.

    Source: sophia, train_sophiag.py: samp_dist, y_sample, loss.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> None:
        """Return None: the logits of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the model's outputs hold."""
        return logits

    def sampled(self, logits: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and what the name of the distribution keeps until the pass is over.

        The loss does not depend on the distribution, so backward does not reach its graph, and
        what that has saved lives as long as the distribution does.

        Shapes:
            exponentials of logsumexp   [b, s, V]  as the logits, for a moment
            normalised logits           [b, s, V]  as the logits, kept by the distribution
            test of normalised logits   [b, s, V]  1 byte, for a moment
            probabilities               [b, s, V]  as the logits, kept by the distribution
            noise of multinomial        [b, s, V]  as the logits, for a moment
            log-softmax                 [b, s, V]  as the logits, saved
        """
        tape, dtype = logits.tape, logits.dtype
        tape.new("exponentials", logits.shape, dtype, _LOGSUMEXP)
        total = tape.new("logsumexp", (BATCH, SEQ, ONE), dtype, _LOGSUMEXP)
        tape.record("logsumexp", (logits,), (logits, total), _unreached, total)
        normalised = tape.new("normalised logits", logits.shape, dtype, _CATEGORICAL)
        tape.record("sub", (logits, total), (), _unreached, normalised)
        del total
        tape.new("normalised logits that are numbers", logits.shape, DType.BOOL, _CATEGORICAL)
        with tape.module("distribution"):
            probabilities = ops.softmax(normalised)
        tape.new("noise", logits.shape, dtype, _MULTINOMIAL)
        labels = tape.new("sampled labels", (BATCH, SEQ), DType.INT64, _SAMPLE)
        loss = ops.nll_loss(ops.log_softmax(logits), labels)
        return loss, [normalised, probabilities, labels]


def _unreached(node: Node, grads: Grads, saved: list[object]) -> Out:
    raise ValueError("the loss of sampled labels does not depend on their distribution")
