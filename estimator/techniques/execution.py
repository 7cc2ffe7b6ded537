"""How the step runs: attention kernel, checkpointing, accumulation, the loop."""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.run import OptimizerChoice, Run
from estimator.techniques.stage import Stage


class Attention(Struct, frozen=True):
    """Which implementation runs, and whether the batch is padded."""

    stage: ClassVar[Stage] = Stage.KERNEL
    name: str
    padding: bool

    def apply(self, run: Run) -> Run:
        """Set the attention of every layer.

        transformers takes `sdpa` by itself where the model class has it, and `eager` elsewhere.

        Raises:
            UnsupportedCombinationError: FlashAttention for a model class that does not run it.

        Source: hf-loading, get_correct_attn_implementation.
        """
        name, spec = self.name, run.spec
        if name == "flash_attention_2" and not spec.supports_flash:
            raise UnsupportedCombinationError(
                f"transformers does not run flash_attention_2 with this {spec.model_type} model; "
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
        settings = replace(run.settings, attention=name, padding=self.padding)
        return replace(run, spec=spec, settings=settings)


class Training(Struct, frozen=True):
    """The optimizer, gradient accumulation, and what the loop keeps."""

    stage: ClassVar[Stage] = Stage.TRAIN
    optimizer: OptimizerChoice
    micro_batches: int
    keeps_outputs: bool
    use_cache: bool

    def apply(self, run: Run) -> Run:
        """Set how the loop trains; master weights were decided with the precision."""
        optimizer = replace(self.optimizer, master_weights=run.optimizer.master_weights)
        return replace(
            run,
            optimizer=optimizer,
            micro_batches=self.micro_batches,
            keeps_outputs=self.keeps_outputs,
            settings=replace(run.settings, keeps_cache=self.use_cache),
        )


class FullCheckpointing(Struct, frozen=True):
    """Recompute every decoder layer in backward; nothing but its input is kept.

    The Trainer makes the embeddings' output want a gradient where the model is frozen.
    """

    stage: ClassVar[Stage] = Stage.CHECKPOINT

    def apply(self, run: Run) -> Run:
        """Checkpoint every layer; a cache cannot be kept with it.

        Raises:
            UnsupportedCombinationError: a prefix, which transformers would silently drop.

        Source: peft, peft_model.py, PeftModel._setup_prompt_encoder; hf-library,
        modeling_layers.py, GradientCheckpointingLayer.__call__.
        """
        if run.prefix_tokens:
            raise UnsupportedCombinationError(
                "prefix tuning lives in the key-value cache, which activation checkpointing drops, "
                "so PEFT refuses it; use activation_checkpointing none, or method prompt_tuning"
            )
        settings = replace(run.settings, keeps_cache=False)
        return replace(run, checkpointing=True, input_requires_grad=True, settings=settings)
