"""How the step runs: attention kernel, checkpointing, accumulation, the loop."""

from __future__ import annotations

import re
from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.eager.checkpoint import Checkpointing
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import ModelSpec
from estimator.run import OptimizerChoice, Run
from estimator.techniques.fp8 import takes_over
from estimator.techniques.optimizers import OPTIMIZERS
from estimator.techniques.stage import Stage


class Attention(Struct, frozen=True):
    """Which implementation runs, and whether the batch is padded."""

    stage: ClassVar[Stage] = Stage.KERNEL
    name: str
    padding: bool
    packing: bool = False

    def apply(self, run: Run) -> Run:
        """Set the attention of every layer.

        transformers takes `sdpa` by itself where the model class has it, and `eager` elsewhere.

        Raises:
            InvalidRequestError: sequences that are packed and padded.
            UnsupportedCombinationError: FlashAttention for a model class that does not run it;
                packed sequences for one that is not told the positions.

        Source: hf-loading, get_correct_attn_implementation.
        """
        name, spec = self.name, run.spec
        if self.packing and self.padding:
            raise InvalidRequestError("packed sequences have no padding; give padding or packing")
        if self.packing and not spec.takes_positions:
            raise UnsupportedCombinationError(
                f"packing has no sourced answer for {spec.model_type} models, which do not tell "
                "packed sequences apart by position_ids here; use padding"
            )
        if name == "flash_attention_3" and any(each.heads.width.value % 8 for each in spec.kinds):
            raise UnsupportedCombinationError(
                "flash_attention_3 takes heads of a width that 8 divides; use flash_attention_2"
            )
        if name == "flex_attention" and not spec.supports_flex:
            raise UnsupportedCombinationError(
                f"transformers does not run flex_attention with this {spec.model_type} model; use "
                f"{'sdpa' if spec.supports_sdpa else 'eager'}"
            )
        if name == "flex_attention" and (run.autocast or _drops_weights(spec)):
            raise UnsupportedCombinationError(
                "flex_attention has no sourced answer under autocast, and transformers refuses it "
                "with dropout on the attention weights; use sdpa or flash_attention_2"
            )
        kernel = None
        if name.startswith("sdpa_"):
            name, _, kernel = name.partition("_")
            if not spec.supports_sdpa or not spec.attention_interface:
                raise UnsupportedCombinationError(
                    f"{self.name} has no sourced answer for {spec.model_type} models, which "
                    "prepare attention by themselves; use sdpa or eager"
                )
        if name.startswith("flash_attention_") and not spec.supports_flash:
            raise UnsupportedCombinationError(
                f"transformers does not run {name} with this {spec.model_type} model; "
                f"use {'sdpa' if spec.supports_sdpa else 'eager'}"
            )
        if name == "sdpa" and not spec.supports_sdpa:
            name = "eager"
            advice = "; attention 'flash_attention_2' avoids that" if spec.supports_flash else ""
            note = (
                f"transformers has no sdpa attention for {spec.model_type} models and falls back "
                f"to eager, which keeps every score{advice}"
            )
            spec = replace(spec, notes=(*spec.notes, note))
        settings = replace(
            run.settings, attention=name, kernel=kernel, padding=self.padding, packing=self.packing
        )
        return replace(run, spec=spec, settings=settings)


def _drops_weights(spec: ModelSpec) -> bool:
    return any(kind.facts.get("attention_dropout", 0.0) for kind in spec.kinds)


class Training(Struct, frozen=True):
    """The optimizer, gradient accumulation, and what the loop keeps."""

    stage: ClassVar[Stage] = Stage.TRAIN
    optimizer: OptimizerChoice
    micro_batches: int
    keeps_outputs: bool
    use_cache: bool
    neftune: bool
    set_to_none: bool
    max_grad_norm: float
    ema: str | None = None

    def apply(self, run: Run) -> Run:
        """Set how the loop trains; master weights and gradients were decided with the precision."""
        optimizer = replace(
            self.optimizer,
            master_weights=run.optimizer.master_weights,
            main_gradients=run.optimizer.main_gradients,
            of_blocks=run.optimizer.of_blocks,
        )
        spec, note = run.spec, OPTIMIZERS[optimizer.name].note
        if note:
            spec = replace(spec, notes=(*spec.notes, note))
        return replace(
            run,
            spec=spec,
            optimizer=optimizer,
            micro_batches=self.micro_batches,
            keeps_outputs=self.keeps_outputs or run.keeps_outputs,
            keeps_gradients=not self.set_to_none,
            limits_norm=self.max_grad_norm > 0,
            averaged_on=self.ema,
            settings=replace(run.settings, keeps_cache=self.use_cache, neftune=self.neftune),
        )


CHECKPOINTING: Final[dict[str, Checkpointing | None]] = {
    "none": None,
    "full": Checkpointing(),
    "full_reentrant": Checkpointing(reentrant=True),
    "every_2": Checkpointing(every=2),
    "selective_attention": Checkpointing(scope="attention", reentrant=False),
    "selective_op": Checkpointing(saves_products=True, reentrant=False),
    "offload": Checkpointing(offload=True),
    "save_on_cpu": Checkpointing(scope="none", offload=True),
}
"""The kinds of activation checkpointing; `every_2` stands for any number.

Source: hf-loading, activation_checkpointing_enable (full, every_n, offload); torch-checkpoint;
torchtitan, _apply_op_sac (selective_op); korthikanti2022, section 5 (selective_attention);
torch-autograd-graph, save_on_cpu.
"""

_COMPOSED: Final = re.compile(
    r"(?:full|every_([1-9]\d{0,3}))(_reentrant|_nonreentrant)?(_offload)?"
)


def parse_checkpointing(text: str) -> Checkpointing | None:
    """Return what a request's `activation_checkpointing` asks for.

    `every_3`, `every_3_offload` or `full_nonreentrant` are put together of their parts; what is
    said of neither is reentrant where the training stack is by default.

    Raises:
        UnsupportedCombinationError: a kind that there is not.

    Example:
        >>> parse_checkpointing("every_4_offload").every
        4
    """
    if text in CHECKPOINTING:
        return CHECKPOINTING[text]
    found = _COMPOSED.fullmatch(text)
    if found is None:
        raise UnsupportedCombinationError(
            f"activation_checkpointing {text!r} has no sourced answer here yet; "
            f"known: {', '.join(CHECKPOINTING)} (any number for 2)"
        )
    every, reentrant, offload = found.groups()
    return Checkpointing(
        every=int(every or 1),
        reentrant=None if reentrant is None else reentrant == "_reentrant",
        offload=offload is not None,
    )


class ActivationCheckpointing(Struct, frozen=True):
    """Recompute in backward what forward has not kept.

    The Trainer makes the embeddings' output want a gradient where the model is frozen, when whole
    layers are checkpointed.
    """

    stage: ClassVar[Stage] = Stage.CHECKPOINT
    how: Checkpointing

    def apply(self, run: Run) -> Run:
        """Mark the layers that are checkpointed: the first, and every n-th behind it.

        Raises:
            UnsupportedCombinationError: attention alone, where the model class does not tell it
                from the rest of the layer; a prefix, which transformers would silently drop.

        Source: hf-loading, PreTrainedModel._set_gradient_checkpointing; peft, peft_model.py,
        PeftModel._setup_prompt_encoder.
        """
        if run.prefix_tokens:
            raise UnsupportedCombinationError(
                "prefix tuning lives in the key-value cache, which activation checkpointing drops, "
                "so PEFT refuses it; use activation_checkpointing none, or method prompt_tuning"
            )
        how = self.how
        if how.scope == "attention" and not run.spec.attention_interface:
            raise UnsupportedCombinationError(
                f"selective_attention is not possible with this {run.spec.model_type} model, whose "
                "attention is no function of its own in transformers; use selective_op or full"
            )
        if how.saves_products and any(map(takes_over, run.spec.module_counts())):
            raise UnsupportedCombinationError(
                "selective_op counts the plain products of a layer, and with fp8 they are no plain "
                "ones; use activation_checkpointing full"
            )
        if how.reentrant is None:
            how = replace(how, reentrant=run.reentrant)
        run = replace(run, checkpointing=how)
        if how.scope != "layers":
            return run
        return replace(
            run, spec=_marked(run.spec, self.how.every), input_requires_grad=run.asks_inputs
        )


def _marked(spec: ModelSpec, every: int) -> ModelSpec:
    """Split each kind of layer into those that are checkpointed and those that are not."""
    if every == 1:
        return replace(spec, kinds=tuple(replace(each, checkpointed=True) for each in spec.kinds))
    asked = [(kind, index % every == 0) for index, kind in enumerate(spec.pattern)]
    distinct = tuple(dict.fromkeys(asked))
    kinds = tuple(
        replace(
            spec.kinds[kind],
            name=f"{'checkpointed ' if marked else ''}{spec.kinds[kind].name}",
            checkpointed=marked,
        )
        for kind, marked in distinct
    )
    return replace(spec, kinds=kinds, pattern=tuple(distinct.index(each) for each in asked))
