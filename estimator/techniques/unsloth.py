"""Unsloth's kernels for LoRA and QLoRA, with its loss."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager.checkpoint import Checkpointing
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Buffer, Linear, Module
from estimator.run import Run
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.quantizations.four_bit import FourBit
from estimator.techniques.stage import Stage
from estimator.techniques.unsloth_adapter import ATTENTION, MLP, OUTPUT, FusedLora, FusedMlp

MODEL_TYPES: Final = ("llama", "mistral")
BUFFER: Final = "unsloth_dequantized_weight"
NOTE: Final = (
    "Unsloth: layers run eagerly, as before torch 2.11 or with UNSLOTH_BLOCK_COMPILE=0; newer "
    "torch compiles each layer by default, which is not counted. The loss is cut for a GPU with "
    "more than 8 GiB free when it first runs; rotary tables are those of max_seq_length = seq_len; "
    "attention is torch's flash kernel, with neither flash-attn nor xformers installed"
)
_GROUPS: Final = {name: group for group in (ATTENTION, OUTPUT, MLP) for name in group}


class Unsloth(Struct, frozen=True):
    """Unsloth's functions in every layer: norms, rotary positions, adapters, MLPs; and its loss.

    The layers run eagerly, which is what Unsloth does before torch 2.11 and, later, with
    UNSLOTH_BLOCK_COMPILE=0; the chunks of the loss are compiled, as they are by default.
    """

    # Last, so that the whole run is known when it is asked what of it has an answer.
    stage: ClassVar[Stage] = Stage.COMPILE

    def apply(self, run: Run) -> Run:
        """Let every layer run them.

        Raises:
            UnsupportedCombinationError: what Unsloth computes in another way, or not at all.

        Source: unsloth, models/llama.py, FastLlamaModel.patch_peft_model; unsloth_zoo
        training_utils.py, prepare_model_for_training, makes the embeddings' output want a gradient.
        """
        for reason, described in _described(run).items():
            if not described:
                raise UnsupportedCombinationError(
                    f"kernels 'unsloth' have a sourced answer here for {reason}"
                )
        spec = run.spec
        linears = [each for kind in spec.kinds for each in kind.modules if isinstance(each, Linear)]
        packed = [each for each in linears if each.format is not None]
        if packed:
            largest = max(packed, key=lambda each: each.weight().parameters)
            # Filled anew for every layer; it is as large as the largest and never let go.
            buffer = Buffer(BUFFER, (largest.fan_out, largest.fan_in), DType.BFLOAT16)
            spec = replace(spec, buffers=(*spec.buffers, buffer))
        spec = replace(spec, notes=(*spec.notes, NOTE))
        return replace(
            run,
            spec=spec.map_modules(_fused),
            loss="unsloth",
            settings=replace(run.settings, unsloth=True),
            input_requires_grad=True,
        )


def _fused(module: Module) -> Module:
    if not isinstance(module, Linear) or module.name not in _GROUPS:
        return module
    plain = module.adapter
    assert isinstance(plain, LoraAdapter)
    kind = FusedMlp if module.name in MLP else FusedLora
    fused = kind(plain.r, 0.0, plain.dtype, group=_GROUPS[module.name])
    return replace(module, adapter=fused)


def _described(run: Run) -> dict[str, bool]:
    """Return what a run has to be, and whether it is."""
    spec, settings, how = run.spec, run.settings, run.checkpointing
    inner = [each for kind in spec.kinds for each in kind.modules if isinstance(each, Linear)]
    adapters = [each.adapter for each in inner]
    trained = {
        weight.name
        for module, _ in spec.module_counts()
        for weight in module.weights()
        if weight.trainable
    }
    return {  # what the refusal says: whether it is so
        f"{' and '.join(MODEL_TYPES)} models without a sliding window": (
            spec.model_type in MODEL_TYPES
            and all(kind.sliding_window is None for kind in spec.kinds)
        ),
        "LoRA on all seven projections of every layer and on nothing else; full fine-tuning runs "
        "no fused function": bool(inner)
        and all(type(each) is LoraAdapter for each in adapters)
        and trained == {"lora_A.weight", "lora_B.weight"}
        and spec.head.adapter is None,
        "lora_dropout 0 and no biases": all(
            not each.bias
            and isinstance(each.adapter, LoraAdapter)
            and not each.adapter.dropout
            and not each.adapter.bias
            for each in inner
        ),
        "adapters in fp32 (adapter_dtype)": all(
            weight.dtype is DType.FLOAT32
            for each in inner
            for weight in each.weights()
            if weight.trainable
        ),
        "weights in bf16, with autocast to bf16 or none": run.autocast in (None, DType.BFLOAT16)
        and spec.embeddings[0].dtype is DType.BFLOAT16,
        "nf4 or no quantization, with quant_storage uint8": all(
            each.format is None
            or (
                isinstance(each.format, FourBit)
                and each.format.stored is DType.BFLOAT16
                and each.format.storage is DType.UINT8
            )
            for each in inner
        ),
        "prepare_kbit false: norms and embeddings stay in bf16": all(
            weight.dtype is DType.BFLOAT16
            for module, _ in spec.module_counts()
            if not isinstance(module, Linear)
            for weight in module.weights()
        ),
        "the loss of transformers 5, in whose place it puts its own": run.loss == "transformers-5",
        "attention 'sdpa', without padding or packing": settings.attention == "sdpa"
        and settings.kernel is None
        and not (settings.padding or settings.packing),
        "no other kernels, products in 8 bits, noise or cache": not (
            settings.liger
            or settings.foak
            or settings.compiled
            or settings.neftune
            or settings.keeps_cache
            or any(each.product for each in inner)
        ),
        "a step of forward, backward and optimizer": not (
            run.forward_only or run.optimizer.in_backward
        ),
        "checkpointing 'none' or 'full' (use_gradient_checkpointing=True); its own 'unsloth' mode, "
        "which offloads on a second stream, is not answered": how is None
        or how in [Checkpointing(reentrant=each) for each in (None, False, True)],
    }
