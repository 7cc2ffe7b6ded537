"""The losses of causal language models: transformers' own, version by version, and fused ones."""

from __future__ import annotations

from typing import Final, Union

from msgspec import Struct

from estimator.eager import compiled, ops
from estimator.eager.foak import FastLoss
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.memory.chunked_loss import ChunkedHead
from estimator.memory.fused_loss import CutCrossEntropy, FusedLinear, FusedLoss
from estimator.memory.outside_loss import OutsideLoss
from estimator.memory.sampled_loss import SampledLabels
from estimator.memory.smoothed_loss import LabelSmoothing
from estimator.memory.unsloth_loss import UnslothLoss
from estimator.model.litgpt import ChunkedLoss
from estimator.model.spec import ModelSpec
from estimator.model.torchtune import EighthsLoss, OneLoss, RecipeLoss
from estimator.sources import Cite


class Loss(Struct, frozen=True):
    """What one version keeps alive; the arithmetic is the same in all.

    Args:
        upcasts_outputs: the model casts its own logits to fp32, so that the half precision ones
            die before the loss, and the outputs hold the fp32 ones.
        shifts_logits: the logits are shifted and written out anew; otherwise the labels are.
    """

    upcasts_outputs: bool
    shifts_logits: bool

    def rows(self, spec: ModelSpec, tokens: int) -> int | None:
        """Return None: the logits of all tokens exist at once."""
        return None

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the model's outputs hold."""
        return ops.cast(logits, ops.F32, "logits in fp32") if self.upcasts_outputs else logits

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Cross entropy in fp32; every local name lives until the function returns.

        Shapes:
            logits          [b, s, V]  width of the model, alive in the caller
            fp32 copy       [b, s, V]  4 bytes, alive until the function returns
            shifted logits  [b, s, V]  4 bytes, likewise; really s - 1 positions
            log-softmax     [b, s, V]  4 bytes, saved

        Source: hf-loss, ForCausalLMLoss and fixed_cross_entropy.
        """
        logits = ops.cast(logits, ops.F32, "logits in fp32")
        if self.shifts_logits:
            flat = ops.copy(ops.narrow(logits, vocab), name="shifted logits")
        else:
            flat = view(logits, (*logits.shape[:-1], vocab))
        return ops.nll_loss(ops.log_softmax(flat), labels)


class CompiledLoss(Struct, frozen=True):
    """The loss of transformers 5 inside a compiled graph."""

    def rows(self, spec: ModelSpec, tokens: int) -> None:
        """Return None: the logits of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the model's outputs hold."""
        return logits

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss, made by two kernels from the model's own logits."""
        return compiled.loss(logits, labels, vocab)


class MeasuredLoss(Loss, frozen=True):
    """The model's own loss, and the metrics that TRL's SFTTrainer makes of the outputs' logits.

    Args:
        copies_for_entropy: entropy and accuracy have a copy of the logits each; the name of the
            first one is bound again only when the second one exists.
    """

    copies_for_entropy: bool = False

    def rows(self, spec: ModelSpec, tokens: int) -> int | None:
        """Return the tokens whose entropy is computed at a time."""
        return min(ENTROPY_ROWS, tokens)

    def measure(self, logits: Tensor) -> None:
        """Make entropy and accuracy, before backward begins.

        Shapes:
            shifted logits, of several sequences  [b, s, V]  as the logits; really s - 1 positions
            log-probabilities, probabilities, their product   [c, V]  as the logits; c tokens
            entropies of all tokens               [b, s]     as the logits

        Source: trl-sft, SFTTrainer.compute_loss; trl-utils, entropy_from_logits.
        """
        tape = logits.tape
        chunk = (dim("c", tape.regime.loss_rows or ENTROPY_ROWS), logits.shape[-1])
        shifted = self._shifted(logits) if self.copies_for_entropy else None
        entropies = tape.new("entropies", (BATCH, SEQ), logits.dtype, _ENTROPY)
        parts = [tape.new(f"entropy, {name}", chunk, logits.dtype, _ENTROPY) for name in _PARTS]
        parts.clear()
        shifted = self._shifted(logits)
        del shifted, entropies

    def _shifted(self, logits: Tensor) -> Tensor | None:
        """Return a copy without the last position; for one sequence it is no copy but a view."""
        if not logits.tape.regime.several_rows:
            return None
        shape = (BATCH, SEQ, logits.shape[-1])
        return logits.tape.new("shifted logits of a metric", shape, logits.dtype, _ACCURACY)


# `entropy_from_logits` works through the logits by so many tokens at a time.
ENTROPY_ROWS: Final = 128
_PARTS: Final = ("log-probabilities", "probabilities", "product of both")
_ENTROPY: Final = Cite("trl-utils", "entropy_from_logits")
_ACCURACY: Final = Cite("trl-sft", "SFTTrainer.compute_loss, shift_logits")

# transformers 5.23.0 and, alike, 4.49.0 to 4.57.1: loss/loss_utils.py, ForCausalLMLoss pads and
# shifts the labels. transformers 4.46.3 and 4.48.1: the same function copies
# `logits[..., :-1, :]`. transformers 4.38.2 and 4.45.2: models/llama/modeling_llama.py,
# LlamaForCausalLM.forward rebinds `logits = logits.float()` and copies the slice.
AnyLoss = Union[
    Loss, ChunkedLoss, CompiledLoss, FastLoss, FusedLoss, LabelSmoothing, OutsideLoss, RecipeLoss,
    SampledLabels,
]  # fmt: skip
LOSSES: Final[dict[str, AnyLoss]] = {
    "transformers-5": Loss(upcasts_outputs=False, shifts_logits=False),
    "compiled": CompiledLoss(),
    "transformers-5-trl-0.27": MeasuredLoss(upcasts_outputs=False, shifts_logits=False),
    "transformers-5-trl-1.3": MeasuredLoss(
        upcasts_outputs=False, shifts_logits=False, copies_for_entropy=True
    ),
    "transformers-4": Loss(upcasts_outputs=False, shifts_logits=True),
    "transformers-4.45": Loss(upcasts_outputs=True, shifts_logits=True),
    "litgpt": ChunkedLoss(),
    "torchtune-0-1": OneLoss(),
    "torchtune-0-6": EighthsLoss(),
    "foak": FastLoss(),
    "unsloth": UnslothLoss(),
    "fused_linear": FusedLinear(),
    "cut_cross_entropy": CutCrossEntropy(),
    "chunked": ChunkedHead(),
    "label_smoothing": LabelSmoothing(),
    "sampled": SampledLabels(),
    "outside": OutsideLoss(),
}
