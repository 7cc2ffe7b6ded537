"""Losses that take the place of the model's own head and loss."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.run import Run
from estimator.techniques.stage import Stage


class Fused(Struct, frozen=True):
    """A loss on hidden states and the head's weight.

    Args:
        name: as the request and `estimator/memory/loss.py` call it.
        library: who wrote it.
        model_types: the models whose forward the library replaces; None for any.
    """

    stage: ClassVar[Stage] = Stage.HEAD
    name: str
    library: str
    model_types: frozenset[str] | None = None

    def apply(self, run: Run) -> Run:
        """Put the loss into the run.

        Raises:
            UnsupportedCombinationError: the library does not patch this model, or the head is more
                than a plain weight, which the library would read past.
        """
        head, model_type = run.spec.head, run.spec.model_type
        if not run.loss.startswith("transformers"):
            raise UnsupportedCombinationError(
                f"loss {self.name!r} takes the place of transformers' own, and {run.loss} "
                "has another; use loss 'standard' with it"
            )
        if self.model_types is not None and model_type not in self.model_types:
            raise UnsupportedCombinationError(
                f"{self.library} has no loss {self.name!r} for {model_type} models; use 'chunked' "
                "or 'standard'"
            )
        if head.adapter or head.format or head.product or head.bias:
            raise UnsupportedCombinationError(
                f"loss {self.name!r} reads nothing of the head but its weight, and that of this "
                "run has an adapter, a quantized weight, a product in 8 bits or a bias; use loss "
                "'standard'"
            )
        return replace(run, loss=self.name)


class Smoothing(Struct, frozen=True):
    """The Trainer's label smoothing, which takes the place of the model's own loss."""

    stage: ClassVar[Stage] = Stage.HEAD

    def apply(self, run: Run) -> Run:
        """Let the Trainer compute the loss.

        Raises:
            UnsupportedCombinationError: a loss that is not transformers 5's own, or virtual tokens.
        """
        if run.loss != "transformers-5" or run.spec.virtual_tokens is not None:
            raise UnsupportedCombinationError(
                "label_smoothing_factor has a sourced answer with loss 'standard' of transformers "
                "5 only, without virtual tokens; set it to 0, or use those"
            )
        return replace(run, loss="label_smoothing")


class OwnLoss(Struct, frozen=True):
    """A hand-written loop that computes the loss from the model's logits, outside autocast."""

    stage: ClassVar[Stage] = Stage.HEAD

    def apply(self, run: Run) -> Run:
        """Let the loop compute the loss.

        Raises:
            UnsupportedCombinationError: a loss that is not transformers 5's own, virtual tokens, a
                prefix, or a step without backward.
        """
        prompted = run.spec.virtual_tokens is not None or run.prefix_tokens > 0
        if run.loss != "transformers-5" or prompted or run.forward_only:
            raise UnsupportedCombinationError(
                "loop.own_loss has a sourced answer with loss 'standard' of transformers 5 only, "
                "with a backward pass and without virtual tokens; set it to false, or use those"
            )
        return replace(run, loss="outside")


class KeptLogits(Struct, frozen=True):
    """Logits of the last positions alone, as transformers' `logits_to_keep` makes them."""

    stage: ClassVar[Stage] = Stage.HEAD
    number: int

    def apply(self, run: Run) -> Run:
        """Keep the last positions.

        Raises:
            UnsupportedCombinationError: a loss that is not transformers 5's own, labels that PEFT
                or packing makes longer than the logits, or a head that is more than its weight.
        """
        head, spec = run.spec.head, run.spec
        refused = {
            "a loss other than 'standard' of transformers 5": run.loss != "transformers-5",
            "virtual tokens, for which PEFT makes the labels longer than the logits": (
                spec.virtual_tokens is not None or run.prefix_tokens > 0
            ),
            "packing": run.settings.packing,
            "a head that is adapted or packed": (
                head.adapter is not None or head.format is not None
            ),
        }
        for what, refuse in refused.items():
            if refuse:
                raise UnsupportedCombinationError(
                    f"logits_to_keep with {what} has no sourced answer here; set it to 0"
                )
        return replace(run, kept_logits=self.number)


# monkey_patch.py of Liger, MODEL_TYPE_TO_APPLY_LIGER_FN, as far as our families go.
_LIGER_MODELS: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"}
)

FUSED_LOSSES: Final[dict[str, Fused]] = {
    "fused_linear": Fused("fused_linear", "Liger", _LIGER_MODELS),
    "cut_cross_entropy": Fused("cut_cross_entropy", "cut-cross-entropy"),
    "chunked": Fused("chunked", "TRL"),
}
