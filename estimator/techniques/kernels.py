"""Kernels that replace parts of the model's layers."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager.checkpoint import Checkpointing
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear, ModelSpec, Module
from estimator.run import Run
from estimator.techniques.foak_adapter import GROUPS, FusedAdapter, refusal
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.stage import Stage, Technique
from estimator.techniques.unsloth import Unsloth


class Liger(Struct, frozen=True):
    """Liger's RMSNorm, rotary positions and SwiGLU or GeGLU; its loss is another field."""

    stage: ClassVar[Stage] = Stage.KERNEL

    def apply(self, run: Run) -> Run:
        """Let every layer run them.

        Raises:
            UnsupportedCombinationError: Liger does not patch this model, or not as read here.
        """
        spec = run.spec
        if spec.model_type not in MODEL_TYPES or not run.loss.startswith("transformers"):
            raise UnsupportedCombinationError(
                f"kernels 'liger' have no sourced answer for {spec.model_type} models here; they "
                f"have one for {', '.join(sorted(MODEL_TYPES))}"
            )
        for kind in spec.kinds:
            activation = kind.facts["activation"]
            if activation not in ACTIVATIONS:
                raise UnsupportedCombinationError(
                    f"Liger has no kernel for an MLP with the activation {activation!r}"
                )
        return replace(run, settings=replace(run.settings, liger=True))


class Foak(Struct, frozen=True):
    """fms-acceleration's kernels (FOAK): RMSNorm, rotary positions, the loss, adapters."""

    stage: ClassVar[Stage] = Stage.KERNEL

    def apply(self, run: Run) -> Run:
        """Let norms, rotary positions and the loss run them, and adapters on quantized weights.

        Raises:
            UnsupportedCombinationError: another model or another transformers.

        Source: fms-foak, models/mistral.py, get_mp_rules; framework_plugin_fast_kernels.py.
        """
        spec = run.spec
        if spec.model_type not in ("llama", "mistral") or run.loss != "transformers-4":
            raise UnsupportedCombinationError(
                "kernels 'foak' have a sourced answer here for llama and mistral models with "
                "software transformers 4 and loss 'standard'"
            )
        linears = [each for each, _ in spec.module_counts() if isinstance(each, Linear)]
        if any(each.format is not None for each in linears):
            spec = _with_fused_adapters(spec)
        settings = replace(run.settings, foak=True)
        return replace(run, spec=spec, loss="foak", settings=settings)


def _with_fused_adapters(spec: ModelSpec) -> ModelSpec:
    """Return a model whose adapters on attention are computed by FOAK's functions.

    Raises:
        UnsupportedCombinationError: adapters elsewhere, or of another kind.

    Source: fms-foak, models/utils.py, trigger_fused_ops and build_lora_fused_ops.
    """
    groups = {name: group for group in GROUPS for name in group}
    adapted = {
        each.name: refusal(each)
        for each, _ in spec.module_counts()
        if isinstance(each, Linear) and each.adapter is not None
    }
    if adapted.keys() != groups.keys():
        raise UnsupportedCombinationError(
            "kernels 'foak' over quantized weights have a sourced answer here for target_modules "
            "['q_proj', 'k_proj', 'v_proj', 'o_proj'] alone"
        )
    reason = next((each for each in adapted.values() if each is not None), None)
    if reason is not None:
        raise UnsupportedCombinationError(
            f"kernels 'foak' over quantized weights have a sourced answer here for {reason}"
        )

    def fuse(module: Module) -> Module:
        if not isinstance(module, Linear) or module.name not in groups:
            return module
        plain = module.adapter
        assert isinstance(plain, LoraAdapter)
        fused = FusedAdapter(plain.r, plain.dropout, plain.dtype, group=groups[module.name])
        return replace(module, adapter=fused)

    return spec.map_modules(fuse)


class Compile(Struct, frozen=True):
    """torch.compile of the whole model, as the Trainer's `torch_compile` asks for it.

    Args:
        cuda_graphs: the mode, `reduce-overhead` or `max-autotune`, records CUDA graphs.
    """

    stage: ClassVar[Stage] = Stage.COMPILE
    cuda_graphs: bool = False

    def apply(self, run: Run) -> Run:
        """Let the model, and its loss unless the loop computes it, run as two compiled graphs.

        Raises:
            UnsupportedCombinationError: what was never compared with the dry run.

        Source: accelerate, Accelerator.prepare_model.
        """
        for what, described in _compiled(run).items():
            if not described:
                raise UnsupportedCombinationError(
                    f"kernels 'compile' have no sourced answer with {what} here yet; leave "
                    "'compile' out: the eager step bounds most compiled ones"
                )
        settings = replace(run.settings, compiled=True, cuda_graphs=self.cuda_graphs)
        # The loss is a part of the graphs unless the loop computes it.
        loss = "compiled" if run.loss == "transformers-5" else run.loss
        return replace(run, loss=loss, settings=settings)


def _compiled(run: Run) -> dict[str, bool]:
    """Return what a run can have beside compilation, and whether this run's is described."""
    spec, settings, how = run.spec, run.settings, run.checkpointing
    known = ", ".join(COMPILED_MODEL_TYPES)
    full, lora = _is_full(spec), _is_lora(spec)
    linears = [each for each, _ in spec.module_counts() if isinstance(each, Linear)]
    stored = spec.embeddings[0].dtype
    bare = full and run.autocast is None and stored is DType.BFLOAT16
    return {
        f"{spec.model_type} models (known: {known})": spec.model_type in COMPILED_MODEL_TYPES,
        "a sliding window": all(kind.sliding_window is None for kind in spec.kinds),
        "attention other than sdpa": settings.attention == "sdpa" and settings.kernel is None,
        "dropout of attention weights": not any(
            kind.facts.get("attention_dropout", 0.0) for kind in spec.kinds
        ),
        "packing": not settings.packing,
        "other kernels": not (settings.liger or settings.foak or settings.unsloth),
        "neftune": not settings.neftune,
        "use_cache": not settings.keeps_cache,
        "loop.keep_outputs": not run.keeps_outputs,
        "loop.logits_to_keep": run.kept_logits == 0,
        "another loss or framework than that of transformers 5": (
            run.loss in ("transformers-5", "outside")
        ),
        "quantization": not any(each.format for each in linears),
        "products in 8-bit floats": not any(each.product for each in linears),
        "methods other than full and LoRA without dropout on all linear layers": full or lora,
        "virtual tokens": run.prompt_tokens == run.prefix_tokens == 0,
        "a step without backward": not run.forward_only,
        "an optimizer in backward": not run.optimizer.in_backward,
        "gradients that stand": not (run.keeps_gradients or run.optimizer.main_gradients),
        "master copies of the weights": not run.optimizer.master_weights,
        "fp16": DType.FLOAT16 not in (stored, run.autocast),
        "full fine-tuning of bf16 weights under autocast": (
            lora or run.autocast is None or stored is DType.FLOAT32
        ),
        "LoRA over fp32 weights": full or stored is DType.BFLOAT16,
        # Dynamo marks a region for recomputation, reentrant or not.
        "activation checkpointing other than full": how is None
        or replace(how, reentrant=None) == Checkpointing(),
        # A hook ends the graph behind the embeddings, and what the scheduler of the layers' graph
        # leaves standing beside attention's backward is not described.
        "activation checkpointing of LoRA": full or how is None,
        "anything but full bf16 training of qwen2 models": spec.model_type != "qwen2" or bare,
        "biases in llama models": spec.model_type != "llama"
        or not any(each.bias for each in linears),
    }


def _is_full(spec: ModelSpec) -> bool:
    """Whether every weight wants a gradient, whichever the optimizer is given."""
    modules = [each for each, _ in spec.module_counts()]
    return all(each.trainable for module in modules for each in module.weights())


def _is_lora(spec: ModelSpec) -> bool:
    """Whether all that is trained is plain fp32 LoRA without dropout, on every linear layer."""
    modules = [each for each, _ in spec.module_counts()]
    trained = {each.name for module in modules for each in module.weights() if each.trainable}
    adapters = [
        each.adapter for kind in spec.kinds for each in kind.modules if isinstance(each, Linear)
    ]
    return trained <= {"lora_A.weight", "lora_B.weight"} and all(
        type(each) is LoraAdapter and not each.dropout and each.dtype is DType.FLOAT32
        for each in adapters
    )


# Compared with the dry run; of those behind the first not every recipe.
COMPILED_MODEL_TYPES: Final = ("llama", "qwen2", "qwen3")

# monkey_patch.py of Liger, apply_liger_kernel_to_*.
MODEL_TYPES: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
)
ACTIVATIONS: Final = frozenset({"silu", "swish", "gelu_pytorch_tanh"})

# The modes of torch.compile: torch-inductor, __init__.py, list_mode_options.
COMPILATIONS: Final[dict[str, Technique]] = {
    "compile": Compile(),
    "compile_reduce_overhead": Compile(cuda_graphs=True),
    "compile_max_autotune": Compile(cuda_graphs=True),
}
KERNELS: Final[dict[str, Technique]] = {
    "liger": Liger(),
    "foak": Foak(),
    "unsloth": Unsloth(),
    **COMPILATIONS,
}
