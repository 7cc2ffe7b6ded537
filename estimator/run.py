"""A resolved run: the model with every technique applied to it, and how its step is executed."""

from __future__ import annotations

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager.checkpoint import Checkpointing
from estimator.model.forward import Settings
from estimator.model.spec import ModelSpec
from estimator.optimizer import Optimizer
from estimator.sources import Cite


class Block(Struct, frozen=True):
    """Values that share one scale in a low-bit state, and where that is read if not at the row."""

    values: int
    source: Cite | None = None


class LowBit(Struct, frozen=True):
    """What low-bit states look like, as far as the loop and the libraries' versions decide.

    The defaults are what HF's Trainer makes of bitsandbytes 0.50 and torchao 0.18.

    Args:
        bitsandbytes: the block of bitsandbytes' 8-bit states.
        torchao_8bit: that of torchao's 8-bit and fp8 ones.
        torchao_4bit: that of its 4-bit ones.
        tables_in_32bit: bitsandbytes is told to keep 32-bit states for embedding tables.
    """

    bitsandbytes: Block = Block(256)
    torchao_8bit: Block = Block(256)
    torchao_4bit: Block = Block(256)
    tables_in_32bit: bool = True


class OptimizerChoice(Struct, frozen=True):
    """The optimizer of a run: what was asked for, and what that did not say.

    Args:
        asked: its name and its knobs.
        implementation: the one that was named, or the optimizer's default.
        master_weights: it updates fp32 copies of the weights.
        in_backward: parameters are updated while backward runs, and gradients dropped.
        of_blocks: the weights that it updates take turns, and are one group.
        main_gradients: gradients are added up in fp32 tensors that are there all the time.
        low_bit: what its low-bit states look like.
    """

    asked: Optimizer
    implementation: str
    master_weights: bool
    in_backward: bool = False
    main_gradients: bool = False
    of_blocks: bool = False
    low_bit: LowBit = LowBit()

    @property
    def name(self) -> str:
        """The name of its row in the table."""
        return self.asked.name


class Run(Struct, frozen=True):
    """Everything that the bytes of a step depend on, except the micro-batch and the length.

    Args:
        spec: the model, with its weights' types, formats and adapters set.
        autocast: the type that autocast casts to, or None.
        checkpointing: how the step recomputes, or None.
        reentrant: plain checkpointing is torch's older implementation, as transformers 4 had it.
        micro_batches: forward and backward passes before one optimizer step.
        keeps_outputs: the loop holds the model's outputs until backward has ended.
        keeps_gradients: gradients are set to zero after a step and not freed.
        input_requires_grad: the embeddings' output is made to want a gradient.
        asks_inputs: layers that are checkpointed make the embeddings' output want a gradient.
        loss: which version of the standard loss runs.
        prompt_tokens: virtual tokens that are put before the text, so that all layers see them.
        prefix_tokens: virtual tokens whose keys and values lie in the cache of every layer.
        keeps_importance: the loop keeps AdaLoRA's three scores of every adapter weight.
        keeps_every_state: the optimizer has states of frozen weights, which were trained before.
        forward_only: the step evaluates the loss and has no backward pass (MeZO).
        limits_norm: the loop scales the gradients where their norm is beyond a limit.
        pads_tokens: products over the tokens are padded to a multiple of 16.
        token_multiple: products over the tokens need a multiple of this.
        averaged_on: the device of a moving average of the model, or None.
        kept_logits: positions at the end that get logits; 0 for all.
        loading: how the model comes onto the device.
    """

    spec: ModelSpec
    settings: Settings
    optimizer: OptimizerChoice
    autocast: DType | None = None
    checkpointing: Checkpointing | None = None
    reentrant: bool = False
    micro_batches: int = 1
    keeps_outputs: bool = False
    keeps_gradients: bool = False
    input_requires_grad: bool = False
    asks_inputs: bool = True
    loss: str = "transformers-5"
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    keeps_importance: bool = False
    keeps_every_state: bool = False
    forward_only: bool = False
    limits_norm: bool = False
    pads_tokens: bool = False
    token_multiple: int = 1
    averaged_on: str | None = None
    kept_logits: int = 0
    loading: str = "one by one"

    def batch(self, micro_batch_size: int, seq_len: int) -> tuple[int, int]:
        """Return the rows that the model sees, and their length: packed sequences are one row.

        Source: hf-collator, DataCollatorWithFlattening.
        """
        if self.settings.packing:
            return 1, micro_batch_size * seq_len
        return micro_batch_size, seq_len

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Return the length of the layers and the second one: of the text, or of the keys."""
        return seq_len + self.prompt_tokens, seq_len + self.prefix_tokens

    @property
    def clips(self) -> bool:
        """Whether `clip_grad_norm_` runs over gradients before the optimizer's step.

        An optimizer in backward leaves it none, and beside master copies Megatron-LM has kernels
        of its own, which hold a few numbers.

        Source: hf-trainer, Trainer._clip_grad_norm; megatron-clip, get_grad_norm_fp32.
        """
        choice = self.optimizer
        elsewhere = choice.in_backward or choice.master_weights
        return self.limits_norm and not self.forward_only and not elsewhere

    @property
    def scales_loss(self) -> bool:
        """Whether a GradScaler scales the loss, as Accelerate's does with fp16 autocast."""
        return self.autocast is DType.FLOAT16 and not self.forward_only

    @property
    def accumulates(self) -> bool:
        """Whether gradients are there already while a forward and a backward pass run."""
        return self.micro_batches > 1 or self.keeps_gradients

    @property
    def gathers(self) -> bool:
        """Whether it is a pass of the run itself that makes the gradients to which others add."""
        choice = self.optimizer
        elsewhere = choice.main_gradients or choice.in_backward or self.forward_only
        return self.accumulates and not elsewhere
