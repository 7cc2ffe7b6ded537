"""From a request and a configuration to a run: defaults filled in, what has no source refused."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from msgspec import structs

from estimator.catalog import Gpu
from estimator.errors import (
    InvalidRequestError,
    UnsupportedCombinationError,
    did_you_mean,
)
from estimator.memory.standing import trained_tensors
from estimator.model.families import read_spec
from estimator.model.forward import Settings
from estimator.model.spec import Linear, ModelSpec
from estimator.optimizer import Optimizer
from estimator.request import TRL_WITHOUT_HEAD, EstimateRequest, Parallelism
from estimator.run import OptimizerChoice, Run
from estimator.techniques.execution import (
    ActivationCheckpointing,
    Attention,
    Training,
    parse_checkpointing,
)
from estimator.techniques.fp8_backends.transformer_engine import TransformerEngine
from estimator.techniques.kernels import KERNELS
from estimator.techniques.loss import FUSED_LOSSES, KeptLogits, OwnLoss, Smoothing
from estimator.techniques.optimizers import OPTIMIZERS, REFUSED, cpu_offload
from estimator.techniques.optimizers.row import updates_any
from estimator.techniques.precision import Precision
from estimator.techniques.software import Software, profile
from estimator.techniques.stage import Technique, apply_all


def resolve(request: EstimateRequest, config: Mapping[str, Any], name: str) -> Run:
    """Return the run that a request asks for.

    Raises:
        InvalidRequestError: fields that contradict each other or the model.
        UnsupportedCombinationError: something that has no source here yet, by name.
        UnsupportedModelError, InvalidConfigError: from the model's configuration.
    """
    optimizer = optimizer_choice(request)
    _refuse_unsupported(request, optimizer)
    spec = _read_model(request, config, name)
    _refuse_contradictions(request, optimizer)
    if OPTIMIZERS[optimizer.name].estimates_hessian:
        _refuse_beside_hessian(request, optimizer)
    bare = Run(spec=spec, settings=Settings(), optimizer=optimizer)
    run = apply_all(_techniques(request, optimizer), bare)
    if run.spec.trainable_parameters() == 0:
        raise InvalidRequestError("nothing is trainable with this method and these targets")
    _refuse_packed_training(run.spec)
    _refuse_tensors(run)
    if run.scales_loss:
        _refuse_scaled_halves(run)
    return run


def _refuse_tensors(run: Run) -> None:
    """Refuse weights that the optimizer cannot update."""
    refuses = OPTIMIZERS[run.optimizer.name].refuses
    if refuses is updates_any or run.forward_only:
        return
    for each in trained_tensors(run):
        if reason := refuses(each):
            raise UnsupportedCombinationError(f"optimizer {run.optimizer.name!r}: {reason}")


def _read_model(request: EstimateRequest, config: Mapping[str, Any], name: str) -> ModelSpec:
    """Return the model as the framework builds it: transformers' own code, or the framework's."""
    code = profile(request.software.framework, request.software.version).model_code
    if code is None:
        return read_spec(config, name)
    _refuse_beside_own_code(request)
    module, _, function = code.partition(":")
    spec: ModelSpec = getattr(import_module(module), function or "read")(config, name)
    return spec


def _refuse_packed_training(spec: ModelSpec) -> None:
    """Refuse to train what is packed; PEFT would ask integers for a gradient."""
    for module, _ in spec.module_counts():
        if isinstance(module, Linear) and module.format is not None:
            if module.trainable:
                raise InvalidRequestError(
                    f"{module.name} is quantized and cannot be trained in full; take it out of "
                    "modules_to_save, or leave quantization out"
                )
            if module.trainable_bias and module.bias:
                raise UnsupportedCombinationError(
                    f"a trained bias of the quantized layer {module.name} has no sourced answer "
                    "here yet; use bias 'none', or leave quantization out"
                )


def _refuse_scaled_halves(run: Run) -> None:
    """Refuse what torch's GradScaler, which comes with fp16 autocast, does not unscale.

    Source: torch-amp, GradScaler._unscale_grads_; accelerate, Accelerator.backward.
    """
    for _, weight, _ in run.spec.tensors():
        if weight.trained and weight.dtype.is_half:
            raise UnsupportedCombinationError(
                f"fp16 autocast scales the loss, and torch's GradScaler refuses to unscale the "
                f"{weight.dtype.label} gradients of {weight.dtype.label} weights; train fp32 "
                "weights (precision 'amp_fp16', or adapter_dtype 'float32'), or use autocast 'bf16'"
            )
    if run.optimizer.in_backward:
        raise UnsupportedCombinationError(
            "an optimizer in backward would use gradients that are still multiplied by the loss "
            "scale of fp16 autocast; use bf16"
        )


def _refuse_beside_own_code(request: EstimateRequest) -> None:
    """Refuse what the framework's own model code is not described for."""
    software, method = request.software, request.method
    own = profile(software.framework, software.version).described
    adapters = getattr(method, "adapter_dtype", "base")
    packed = request.quantization
    known = {
        f"attention {request.attention!r}": request.attention == "sdpa",
        f"precision {request.precision!r}": request.precision in own.precisions,
        "autocast": request.autocast is None,
        "padding": not request.padding,
        "packing": not request.packing,
        f"activation checkpointing {request.activation_checkpointing!r}": (
            request.activation_checkpointing in own.checkpointing
        ),
        f"loss {request.loss!r}": request.loss == "standard",
        f"kernels {list(request.kernels)}": not request.kernels,
        f"method {method.name!r}": method.name in own.methods,
        "use_dora": not getattr(method, "use_dora", False),
        "modules_to_save": not getattr(method, "modules_to_save", ()),
        f"adapter_dtype {adapters!r}": adapters in own.adapter_dtypes,
        f"quantization {packed.name if packed else None!r}": (
            packed is None or packed.name in own.quantizations
        ),
        "prepare_kbit": packed is None or not packed.prepare_kbit,
        "loop.neftune_noise_alpha": request.loop.neftune_noise_alpha is None,
        "loop.ema": request.loop.ema is None,
        "loop.logits_to_keep": request.loop.logits_to_keep == 0,
    }
    for what, described in known.items():
        if not described:
            raise UnsupportedCombinationError(
                f"{what} with software {request.software.framework!r} has no sourced answer here "
                "yet; use software 'transformers'"
            )


def optimizer_choice(request: EstimateRequest) -> OptimizerChoice:
    """Return the optimizer with its implementation filled in.

    Raises:
        InvalidRequestError: an optimizer, an implementation or a knob that there is not.
        UnsupportedCombinationError: an optimizer that is known by name only.
    """
    asked = request.optimizer
    if asked.name in REFUSED:
        raise UnsupportedCombinationError(
            f"optimizer {asked.name!r} has no sourced answer here: {REFUSED[asked.name]}"
        )
    row = OPTIMIZERS.get(asked.name)
    if row is None:
        raise InvalidRequestError(
            f"unknown optimizer {asked.name!r}{did_you_mean(asked.name, OPTIMIZERS)}; "
            f"known: {', '.join(sorted(OPTIMIZERS))}"
        )
    implementation = asked.implementation or row.default
    if implementation not in row.updates:
        raise InvalidRequestError(
            f"optimizer {asked.name!r} has no implementation {implementation!r}; it has "
            f"{', '.join(sorted(row.updates))}"
        )
    for needed in row.needs:
        if not getattr(asked, needed):
            raise InvalidRequestError(f"optimizer {asked.name!r} does not run without {needed}")
    for knob in structs.fields(Optimizer):
        given = getattr(asked, knob.name) != knob.default
        if given and knob.name not in (*_ANY_OPTIMIZER, *row.knobs):
            known = ", ".join(
                name for name, other in OPTIMIZERS.items() if knob.name in other.knobs
            )
            raise InvalidRequestError(f"{knob.name} is a setting of {known}, not of {asked.name!r}")
    return OptimizerChoice(
        asked,
        implementation,
        master_weights=False,
        in_backward=asked.in_backward or row.fused_backward or asked.offload_gradients,
        low_bit=profile(request.software.framework, request.software.version).low_bit,
    )


# Precisions that store every weight in one type, without autocast.
_PLAIN: Final = ("bf16", "fp16", "fp32", "tf32")

_ANY_OPTIMIZER: Final = ("name", "implementation", "in_backward")


def _techniques(request: EstimateRequest, optimizer: OptimizerChoice) -> tuple[Technique, ...]:
    software = profile(request.software.framework, request.software.version)
    chosen: list[Technique] = [
        request.method,
        Precision(request.precision, request.autocast),
        Attention(request.attention, request.padding, request.packing),
        Software(software),
        Training(
            optimizer,
            micro_batches=request.gradient_accumulation_steps,
            keeps_outputs=request.loop.keep_outputs,
            use_cache=request.loop.use_cache,
            neftune=request.loop.neftune_noise_alpha is not None,
            set_to_none=request.loop.set_to_none,
            max_grad_norm=request.loop.max_grad_norm if software.clips else 0.0,
            ema=request.loop.ema,
        ),
    ]
    if request.quantization is not None:
        chosen.append(request.quantization)
    chosen += [KERNELS[each] for each in request.kernels]
    if request.fp8 is not None:
        chosen.append(request.fp8)
    if request.qat is not None:
        chosen.append(request.qat)
    if request.loop.label_smoothing_factor:
        chosen.append(Smoothing())
    if request.loop.own_loss:
        chosen.append(OwnLoss())
    if request.loss in FUSED_LOSSES:
        chosen.append(FUSED_LOSSES[request.loss])
    if request.loop.logits_to_keep:
        chosen.append(KeptLogits(request.loop.logits_to_keep))
    checkpointing = parse_checkpointing(request.activation_checkpointing)
    if checkpointing is not None:
        chosen.append(ActivationCheckpointing(checkpointing))
    return tuple(chosen)


def _refuse_unsupported(request: EstimateRequest, optimizer: OptimizerChoice) -> None:
    """Refuse by name what the document can say and this version cannot answer."""
    default = Parallelism()
    trl = request.software.framework == "trl"
    old_trl = trl and request.software.version in TRL_WITHOUT_HEAD
    new_trl = trl and not old_trl
    refused = {
        f"task {request.task!r} (beside sft and pretrain)": request.task not in ("sft", "pretrain"),
        f"loss {request.loss!r} with software 'trl', whose SFTTrainer has a head of its own "
        "(loss 'chunked')": new_trl and request.loss == "standard",
        "loss 'chunked' with this version of TRL, whose loss is 'standard',": (
            old_trl and request.loss == "chunked"
        ),
        f"loss {request.loss!r}": request.loss not in ("standard", *FUSED_LOSSES),
        f"kernels {list(request.kernels)} (known: {', '.join(KERNELS)})": not (
            set(request.kernels) <= KERNELS.keys()
        ),
        "loop.ema with packed weights": (
            request.loop.ema is not None and request.quantization is not None
        ),
        f"an optimizer in backward with precision {request.precision!r}": (
            optimizer.in_backward and request.precision in ("master_bf16", "megatron_bf16")
        ),
        f"optimizer {optimizer.name!r} with loop.set_to_none=false": (
            OPTIMIZERS[optimizer.name].spends_gradients and not request.loop.set_to_none
        ),
        f"optimizer {optimizer.name!r} with a method that freezes weights": (
            OPTIMIZERS[optimizer.name].trains_all and not request.method.trains_base
        ),
        f"optimizer {optimizer.name!r} with precision {request.precision!r}": (
            request.precision in OPTIMIZERS[optimizer.name].not_with
        ),
        f"optimizer {optimizer.name!r} with method {request.method.name!r}": (
            request.method.optimizers is not None
            and optimizer.name not in request.method.optimizers
        ),
        f"an optimizer in backward with method {request.method.name!r}": (
            request.method.takes_turns and optimizer.in_backward
        ),
        f"precision {request.precision!r} with method {request.method.name!r}": (
            request.method.precisions is not None
            and request.precision not in request.method.precisions
        ),
        # Its hooks are on every weight that requires a gradient.
        f"optimizer {optimizer.name!r} with method.freeze_others=false": (
            request.method.leaves_gradients and OPTIMIZERS[optimizer.name].fused_backward
        ),
        # It has one place for the gradient of each such weight, and updates them all.
        "precision 'megatron_bf16' with method.freeze_others=false": (
            request.method.leaves_gradients and request.precision == "megatron_bf16"
        ),
        # Its trainer clears the gradients of the whole model.
        "method.freeze_others=false with software 'trl'": request.method.leaves_gradients and trl,
        **dict(cpu_offload.refusals(request)),
        "kernels 'unsloth' over fp4 weights, which it dequantizes otherwise than nf4,": (
            "unsloth" in request.kernels
            and request.quantization is not None
            and request.quantization.name == "fp4"
        ),
        "parallelism other than one GPU (num_gpus 1, every degree 1)": (
            request.parallelism != default or request.hardware.num_gpus != 1
        ),
    }
    for what, refuse in refused.items():
        if refuse:
            raise UnsupportedCombinationError(f"{what} has no sourced answer here yet")


def _refuse_contradictions(request: EstimateRequest, optimizer: OptimizerChoice) -> None:
    if request.quantization is not None and request.method.trains_base:
        raise InvalidRequestError(
            "quantized weights cannot be trained; choose method 'lora' (together they are QLoRA)"
        )
    if request.quantization is not None:
        request.method.refuse(request.quantization.name)
        software = request.software
        request.quantization.refuse(request.method, software.framework, software.version)
    if request.quantization is not None and request.precision not in _PLAIN:
        raise InvalidRequestError(
            f"precision {request.precision!r} does not go with packed weights; choose bf16, fp16 "
            "or fp32, and autocast beside it"
        )

    if optimizer.in_backward and not request.loop.set_to_none:
        raise InvalidRequestError(
            "an optimizer in backward drops each gradient itself; leave out loop.set_to_none=false"
        )
    if request.method.without_backward:
        _refuse_without_backward(request)
    if optimizer.in_backward and request.gradient_accumulation_steps > 1:
        raise InvalidRequestError(
            "an optimizer in backward drops each gradient as soon as it has been used, and leaves "
            "nothing to accumulate into; set gradient_accumulation_steps to 1"
        )


def _refuse_beside_hessian(request: EstimateRequest, optimizer: OptimizerChoice) -> None:
    """Refuse what the pass that estimates the Hessian was not compared with."""
    software, loop = request.software, request.loop
    unknown = {
        f"method {request.method.name!r}": request.method.name not in ("full", "lora"),
        f"loss {request.loss!r}": request.loss != "standard",
        f"kernels {list(request.kernels)}": bool(request.kernels),
        "fp8": request.fp8 is not None,
        "packing": request.packing,
        "optimizer.in_backward": optimizer.in_backward,
        "autocast 'fp16'": request.autocast == "fp16",
        "loop.label_smoothing_factor": loop.label_smoothing_factor > 0,
        "loop.logits_to_keep": loop.logits_to_keep > 0,
        "loop.own_loss": loop.own_loss,
        "loop.set_to_none=false": not loop.set_to_none,
        "loop.neftune_noise_alpha": loop.neftune_noise_alpha is not None,
        "loop.use_cache": loop.use_cache,
        "loop.keep_outputs": loop.keep_outputs,
        "loop.ema": loop.ema is not None,
        f"software {software.framework!r} {software.version!r}": (
            (software.framework, software.version) != ("transformers", "5")
        ),
    }
    for what, asked in unknown.items():
        if asked:
            raise UnsupportedCombinationError(
                f"optimizer {optimizer.name!r} has a pass that estimates the Hessian, which has no "
                f"sourced answer here with {what}; leave it at its default, or use 'adamw'"
            )


def _refuse_without_backward(request: EstimateRequest) -> None:
    """Refuse what presumes gradients: MeZO asserts a single micro-batch, and the rest is moot."""
    moot = {
        "gradient_accumulation_steps above 1": request.gradient_accumulation_steps > 1,
        "activation_checkpointing": request.activation_checkpointing != "none",
        "optimizer.in_backward": request.optimizer.in_backward,
        f"precision {request.precision!r}": (
            request.precision not in (*_PLAIN, "amp_bf16", "amp_fp16")
        ),
        "loop.keep_outputs": request.loop.keep_outputs,
    }
    for what, asked in moot.items():
        if asked:
            raise UnsupportedCombinationError(
                f"method {request.method.name!r} has no backward pass, and {what} no source with "
                "it; leave it at its default"
            )


def check_length(run: Run, seq_len: int) -> None:
    """Refuse a length that the model's table of positions does not reach.

    Raises:
        InvalidRequestError: the table is shorter.
    """
    spec, virtual = run.spec, run.prompt_tokens + run.prefix_tokens
    if run.kept_logits > seq_len:
        raise InvalidRequestError(
            f"logits_to_keep {run.kept_logits} is more than seq_len {seq_len}; 0 keeps all"
        )
    if spec.max_positions is not None and seq_len + virtual > spec.max_positions:
        beside = f" and {virtual} virtual tokens" if virtual else ""
        raise InvalidRequestError(
            f"seq_len {seq_len}{beside} is beyond the {spec.max_positions} positions that this "
            f"{spec.model_type} model has in its table; give seq_len "
            f"{spec.max_positions - virtual} or less"
        )


def check_gpu(request: EstimateRequest, gpu: Gpu | None) -> None:
    """Refuse a card without the kernels that a request asks for.

    Raises:
        InvalidRequestError: products in 8-bit floats on a card that has none.
    """
    if request.fp8 is not None and gpu is not None and not gpu.multiplies_in_8_bits:
        raise InvalidRequestError(
            f"fp8 needs compute capability 8.9 (Ada, Hopper and later), and {gpu.name} has "
            f"{gpu.compute_capability}; leave out fp8"
        )
    major = gpu.compute_capability.partition(".")[0] if gpu is not None else ""
    if isinstance(request.fp8, TransformerEngine) and major in ("10", "11"):
        raise UnsupportedCombinationError(
            "fp8 'te' is described for Ada and Hopper here, and data-centre Blackwell needs no "
            "transposed copies; use fp8 'torchao'"
        )


def check_tokens(run: Run, tokens: int) -> None:
    """Refuse a micro-batch whose tokens the kernels of this run do not take.

    Raises:
        InvalidRequestError: the tokens are no multiple of what the kernel needs.

    Source: torch-meta, _check_scaled_mm_sizes.
    """
    if tokens % run.token_multiple:
        raise InvalidRequestError(
            f"fp8 multiplies over {tokens} tokens here, and its kernel takes multiples of "
            f"{run.token_multiple} only; choose another seq_len, or 'torchao' with pad_inner_dim"
        )
