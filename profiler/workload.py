"""A request made real: the model, the adapters, the optimizer, the batch and the training step.

One description of the recipe serves every engine that runs real code. The dry run calls it under
fake tensors and the GPU measurement calls it on a device, so nothing about a recipe is written
twice; `Workload.fake` tells the two apart, and nothing else does. The order of events is that of
the Hugging Face Trainer (`Trainer.training_step` and `Accelerator.prepare_model`), unless the
request's `loop` says that the loop is hand-written.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from estimator.components import Component
from estimator.errors import (
    InvalidConfigError,
    InvalidRequestError,
    MissingDependencyError,
    UnsupportedCombinationError,
    UnsupportedModelError,
)
from estimator.request import TRL_WITHOUT_HEAD, EstimateRequest
from estimator.techniques.execution import parse_checkpointing
from estimator.techniques.software import profile
from profiler import (
    float8,
    kernels,
    losses,
    methods,
    optimizers,
    qat,
    quantized,
    trace,
    trl_metrics,
    unsloth,
)
from profiler.placement import place

PhaseCallback = Callable[[str], None]

# The dtype of the stored parameters for each `precision` of a request.
_STORED: Final[dict[str, str]] = {
    "fp32": "float32",
    "tf32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "master_bf16": "bfloat16",
    "megatron_bf16": "bfloat16",
    "amp_bf16": "float32",
    "amp_fp16": "float32",
}
_AUTOCAST: Final[dict[str, str]] = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}
_AUTOCAST_FIELD: Final[dict[str, str]] = {"bf16": "bfloat16", "fp16": "float16"}

# Keys of a config.json that name code, a dtype or a kernel; the request decides these.
_IGNORED_CONFIG_KEYS: Final = (
    "auto_map", "quantization_config", "dtype", "torch_dtype", "_attn_implementation",
    "attn_implementation", "_name_or_path",
)  # fmt: skip

# From the second micro-batch on, each does what the second did: gradients exist and are added to.
_MICRO_STEPS: Final = 2

ATTENTION: Final = (
    "eager", "sdpa", "sdpa_math", "sdpa_efficient", "sdpa_flash", "sdpa_cudnn",
    "flash_attention_2", "flash_attention_3", "flex_attention",
)  # fmt: skip

# What HF's data collators for causal language models return.
_MODEL_INPUTS: Final = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that one training run keeps between steps.

    Args:
        model: the model in training mode, adapters applied, on its device.
        optimizer: ready to step; its states are born in the first step.
        request: what was asked.
        device: where its tensors live.
        compute_capability, multiprocessors: of the GPU; some libraries choose their path by them.
        trained: how many tensors the whole model trains, where this one has fewer layers.
        scaler: Accelerate's GradScaler of fp16 autocast.
        average: torch's AveragedModel on the GPU.
        fake: whether its tensors are fake ones, which need stand-ins for what has no values and for
            kernels that are not there; on a real device everything runs as it is installed.
        names: what a loop that computes the loss itself has names for: logits, and their copy.
    """

    model: Any
    optimizer: Any
    request: EstimateRequest
    device: str
    compute_capability: tuple[int, int] = (8, 0)
    multiprocessors: int = 108
    trained: int | None = None
    scaler: Any = None
    average: Any = None
    fake: bool = True
    names: dict[str, Any] = dataclasses.field(default_factory=dict)

    def step(self, phase: PhaseCallback) -> None:
        """Run one optimizer step: all its micro-batches, the update, and the clearing of gradients.

        Args:
            phase: called with the name of each phase when it begins.
        """
        from profiler import lisa, mezo

        lisa.begin_step(self.model, self.request.method, self.optimizer)
        phase(trace.BATCH)
        # `Trainer.get_batch_samples` holds every batch of the step on the device until its end.
        batches = [self._batch() for _ in range(self.request.gradient_accumulation_steps)]
        loss = losses.of(self.request, fake=self.fake)
        with self._kernels(), loss.running(self.model, phase, self.compute_capability):
            if self.request.method.without_backward:
                mezo.step(self.model, batches[0], phase)
                return
            for inputs in self._run(batches):
                self._micro_step(inputs, phase)
        self._clip(phase)
        phase(trace.OPTIMIZER_STEP)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        if getattr(self.request.method, "update_and_allocate", False):
            # Before `tinit` only the scores are kept; cutting ranks needs values, and no more room.
            self.model.base_model.update_and_allocate(0)
        phase(trace.OPTIMIZER_STEP)
        self.optimizer.zero_grad(set_to_none=self.request.loop.set_to_none)
        if hasattr(self.optimizer, "update_hessian"):
            self._estimate_hessian(batches, phase)

    def _batch(self) -> dict[str, Any]:
        """Return a batch; one with values has random ones, as real text has."""
        if self.fake:
            return batch(self.request, self.device)
        return randomized(batch(self.request, self.device), vocab_size(self.model))

    def _run(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the micro-batches to run: on fake tensors, those that differ."""
        return batches[:_MICRO_STEPS] if self.fake else batches

    def _kernels(self) -> AbstractContextManager[None]:
        return kernels.running(
            self.request, self.compute_capability, self.multiprocessors, fake=self.fake
        )

    def _forward_context(self) -> AbstractContextManager[Any]:
        from profiler.checkpointing import forward_context

        how = parse_checkpointing(self.request.activation_checkpointing)
        return forward_context(how, fake=self.fake)

    def _estimate_hessian(self, batches: list[dict[str, Any]], phase: PhaseCallback) -> None:
        """Run the pass that follows some steps of SophiaG."""
        from profiler import sophia

        phase(trace.ESTIMATE_HESSIAN)
        micro_batches = self.request.gradient_accumulation_steps
        with self._kernels(), self._forward_context():
            for inputs in self._run(batches):
                sophia.backward(self.model, inputs, phase, micro_batches)
        self._clip(phase)
        phase(trace.OPTIMIZER_STEP)
        self.optimizer.update_hessian()
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self, phase: PhaseCallback) -> None:
        """Clip the gradients as `Trainer._clip_grad_norm` does, if any are left.

        On CUDA torch takes the foreach operators by itself, for fake tensors it has to be told.
        """
        import torch

        if self.request.loop.max_grad_norm == 0 or not optimizers.leaves_gradients(self.optimizer):
            return
        stack, trained = torch.stack, self.trained

        def of_the_whole_model(norms: list[Any]) -> Any:
            return stack((norms * trained)[:trained] if trained else norms)

        phase(trace.GRADIENT_CLIPPING)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        with mock.patch.object(torch, "stack", of_the_whole_model):
            torch.nn.utils.clip_grad_norm_(
                list(self.model.parameters()),
                self.request.loop.max_grad_norm,
                foreach=True if self.fake else None,
            )

    def _loss(self, inputs: dict[str, Any], phase: PhaseCallback) -> tuple[Any, Any]:
        """Return the model's outputs and the loss, as `Trainer.compute_loss` does."""
        if self.request.loop.own_loss:
            return None, self._own_loss(inputs, phase)
        smoothing = self.request.loop.label_smoothing_factor
        if not smoothing:
            if kept := self.request.loop.logits_to_keep:
                inputs = {**inputs, "logits_to_keep": kept}
            outputs = self.model(**inputs)
            software = self.request.software
            if software.version in TRL_WITHOUT_HEAD and self.request.loss == "standard":
                trl_metrics.measure(outputs["logits"], inputs["labels"], software.version)
            return outputs, outputs["loss"]
        smoother = _import("transformers.trainer_pt_utils").LabelSmoother(epsilon=smoothing)
        outputs = self.model(**{name: each for name, each in inputs.items() if name != "labels"})
        phase(trace.LOSS_FORWARD)
        return outputs, smoother(outputs, inputs["labels"], shift_labels=True)

    def _own_loss(self, inputs: dict[str, Any], phase: PhaseCallback) -> Any:
        """Return the loss as hand-written loops make it of the model's logits."""
        import torch

        given = {name: each for name, each in inputs.items() if name != "labels"}
        self.names["logits"] = self.model(**given)["logits"]
        phase(trace.LOSS_FORWARD)
        self.names["shifted"] = self.names["logits"][:, :-1].contiguous()
        flat = self.names["shifted"].view(-1, self.names["shifted"].size(-1))
        return torch.nn.functional.cross_entropy(flat, inputs["labels"][:, 1:].reshape(-1))

    def _micro_step(self, inputs: dict[str, Any], phase: PhaseCallback) -> None:
        import torch

        phase(trace.FORWARD)
        with self._forward_context():
            outputs, loss = self._loss(inputs, phase)
        if not self.request.loop.keep_outputs:
            del outputs
        if self.request.gradient_accumulation_steps > 1:
            loss = loss / self.request.gradient_accumulation_steps
        phase(trace.BACKWARD)
        if isinstance(self.optimizer, optimizers.FusedBackward):
            self.optimizer.backward(loss)
            return
        # `Tensor.backward` leaves a torch-function mode before it calls this very function.
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))


def meta_model(request: EstimateRequest, config: Any, *, fake: bool = True) -> Any:
    """Return the model of a request on the meta device, in training mode, adapters applied.

    Built without fake tensors: PEFT moves modules with `.to()`, which fails on fake parameters.

    Args:
        request: one single-GPU run.
        config: from `model_config`; it is copied, not changed.
        fake: whether it will run on fake tensors, so that libraries come without their kernels.

    Raises:
        UnsupportedCombinationError: the recipe needs a part that is not run here.
        InvalidRequestError: the real stack refuses the recipe; its reason is in the message.
        MissingDependencyError: a library that the recipe needs is not installed.
    """
    from profiler import checkpointing

    refuse_unsupported(request)
    model = bare_model(request, config)
    kernels.fit(model, request, fake=fake)
    losses.of(request, fake=fake).fit(model)
    model.config.use_cache = request.loop.use_cache
    if request.quantization is not None:
        model = _quantized(model, request)
    elif not request.method.trains_base:
        model.requires_grad_(False)
    if request.method.peft is not None:
        _import("peft")
    model = methods.trained(model, request)
    float8.convert(model, request)
    qat.convert(model, request)
    if unsloth.wanted(request):
        unsloth.fit(model)
    how = parse_checkpointing(request.activation_checkpointing)
    if how is not None:
        if how.reentrant is None:
            software = profile(request.software.framework, request.software.version)
            how = replace(how, reentrant=software.reentrant)
        checkpointing.enable(model, how)
    model.train()
    return model


def start(
    model: Any,
    request: EstimateRequest,
    device: str,
    compute_capability: tuple[int, int] = (8, 0),
    multiprocessors: int = 108,
    trained: int | None = None,
    *,
    fake: bool = True,
) -> Workload:
    """Give a meta model its storage and its optimizer.

    Args:
        model: from `meta_model`.
        request: the request that it was built for.
        device: where the tensors live; inside a fake tensor mode, `cpu`.
        compute_capability, multiprocessors: of the GPU that is run on, or imitated.
        trained: how many tensors the whole model trains, where this one has fewer layers.
        fake: whether this is called inside a fake tensor mode.
    """
    place(model, device, fake=fake)
    if request.loop.neftune_noise_alpha is not None:
        neftune = _import("transformers.integrations.neftune")
        neftune.activate_neftune(model, request.loop.neftune_noise_alpha)
    average = _average(model, request)
    _wrap_autocast(model, autocast_dtype(request), device, converts=not request.loop.own_loss)
    kernels.compile_model(model, request, compute_capability, multiprocessors, fake=fake)
    return Workload(
        model=model,
        optimizer=optimizers.build(model, request, fake=fake),
        request=request,
        device=device,
        compute_capability=compute_capability,
        multiprocessors=multiprocessors,
        trained=trained,
        scaler=_scaler(request, device),
        average=average,
        fake=fake,
    )


def _average(model: Any, request: EstimateRequest) -> Any:
    """Return a moving average of the model; one in host memory is left out."""
    if request.loop.ema != "cuda":
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode

    swa = _import("torch.optim.swa_utils")
    # A copy of a fake tensor belongs to the same world as the tensor.
    with mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True):
        return swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.999))


def _scaler(request: EstimateRequest, device: str) -> Any:
    """Return torch's GradScaler where fp16 autocast brings it.

    An infinite gradient makes it skip a step; here none is skipped, so that no run ends before its
    optimizer has states.

    Source: accelerate, Accelerator.__init__ and utils/modeling.py, get_grad_scaler.
    """
    import torch

    if autocast_dtype(request) != "float16" or request.method.without_backward:
        return None

    class Scaler(torch.amp.GradScaler):  # type: ignore[misc]  # torch is not typed here
        def _maybe_opt_step(self, optimizer: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            return optimizer.step(*args, **kwargs)

    return Scaler(device.partition(":")[0])


def standing(job: Workload) -> Iterator[tuple[Any, str, str, Component]]:
    """Yield what lives before the first step: the tensor, its owner, what it is, its component."""
    import torch

    for path, parameter in job.model.named_parameters():
        for name, tensor in quantized.parts(parameter).items():
            yield tensor, f"{path}{name}", "parameter", "weights"
    for path, module in job.model.named_modules():
        for name, tensor in quantized.tensors(module).items():
            yield tensor, f"{path}.{name}", "quantization state", "weights"
    for path, parameter in job.model.named_parameters():
        if hasattr(parameter, "main_grad"):
            yield parameter.main_grad, path, "main_grad", "gradients"
    for path, buffer in job.model.named_buffers():
        yield buffer, path, "buffer", "buffers"
    if job.average is not None:
        for path, parameter in job.average.module.named_parameters():
            yield parameter, path, "moving average", "weights"
        for path, buffer in job.average.module.named_buffers():
            yield buffer, path, "moving average", "buffers"
        yield job.average.n_averaged, "", "n_averaged", "buffers"
    paths = {id(parameter): path for path, parameter in job.model.named_parameters()}
    for parameter, state in job.optimizer.state.items():
        for tensor in filter(torch.is_tensor, state.values()):
            yield tensor, paths[id(parameter)], "master copy", "optimizer_states"
    for name, table in getattr(job.optimizer, "name2qmap", {}).items():
        yield table, "", f"code book {name}", "optimizer_states"


def refuse_unsupported(request: EstimateRequest) -> None:
    """Refuse by name what this workload does not run.

    Raises:
        UnsupportedCombinationError: always with the field and what to use instead.
    """
    allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "task": (request.task, ("sft", "pretrain")),
        "attention": (request.attention, ATTENTION),
        "loss": (request.loss, tuple(losses.LOSSES)),
        "kernels": (request.kernels, kernels.SETS),
        "parallelism.strategy": (request.parallelism.strategy, ("none",)),
        "hardware.num_gpus": (request.hardware.num_gpus, (1,)),
        "software.framework": (request.software.framework, ("transformers", "trl")),
        "software.version": (request.software.version, ("5", "1.16", *TRL_WITHOUT_HEAD)),
    }
    for field, (value, known) in allowed.items():
        if value not in known:
            choices = ", ".join(repr(item) for item in known)
            raise UnsupportedCombinationError(
                f"the dry run cannot run {field}={value!r} yet; it runs {choices}"
            )
    if request.method.name == "prefix_tuning" and request.activation_checkpointing != "none":
        raise UnsupportedCombinationError(
            "activation checkpointing drops the key-value cache in which a prefix lives; use "
            "activation_checkpointing none, or method prompt_tuning"
        )
    if request.quantization is not None:
        request.method.refuse(request.quantization.name)
        software = request.software
        request.quantization.refuse(request.method, software.framework, software.version)
    if request.quantization is not None and request.method.trains_base:
        raise InvalidRequestError(
            "quantized base weights cannot be trained; use method=lora with quantization"
        )


def autocast_dtype(request: EstimateRequest) -> str | None:
    """Return torch's name of the dtype that autocast computes in, or None without autocast."""
    if request.autocast is not None:
        return _AUTOCAST_FIELD[request.autocast]
    return _AUTOCAST.get(request.precision)


def model_config(config: dict[str, Any]) -> Any:
    """Return the transformers configuration object of a config.json; never runs remote code.

    Raises:
        InvalidConfigError: no `model_type`, or values that its class refuses.
        UnsupportedModelError: the installed transformers does not know the `model_type`.
    """
    transformers = _import("transformers")
    known = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
    name = known.get("model_type")
    if not isinstance(name, str):
        raise InvalidConfigError("the model's config has no 'model_type'; add it")
    if name not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no model_type {name!r} and remote code "
            "is never run; use a newer transformers"
        )
    try:
        return transformers.CONFIG_MAPPING[name].from_dict(known)
    except Exception as error:
        raise InvalidConfigError(f"the model's config is refused: {one_line(error)}") from error


def batch(request: EstimateRequest, device: str) -> dict[str, Any]:
    """Return one batch as HF's data collators make it; with padding, the last token is padding.

    Packed sequences are one row with positions, as DataCollatorWithFlattening makes it.
    """
    import torch

    if request.packing:
        return _packed_batch(request, device)

    shape = (request.micro_batch_size, request.seq_len)
    inputs = {name: torch.ones(shape, dtype=torch.int64, device=device) for name in _MODEL_INPUTS}
    if request.padding:
        inputs["attention_mask"][-1, -1:].fill_(0)
    if kept := request.loop.logits_to_keep:
        # As many labels as logits, or the loss does not take them.
        inputs["labels"] = torch.ones(shape[0], kept, dtype=torch.int64, device=device)
    return inputs


def _packed_batch(request: EstimateRequest, device: str) -> dict[str, Any]:
    import torch

    rows, length = request.micro_batch_size, request.seq_len
    flat = (1, rows * length)
    positions = torch.arange(rows * length, dtype=torch.int64, device=device) % length
    return {
        "input_ids": torch.ones(flat, dtype=torch.int64, device=device),
        "position_ids": positions.view(flat),
        "labels": torch.ones(flat, dtype=torch.int64, device=device),
    }


def randomized(inputs: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Fill the token ids of a batch with random ones, in place; labels are the ids where both fit.

    Equal ids would make the embedding's backward add all rows into one.
    """
    inputs["input_ids"].random_(0, vocab_size)
    if inputs["labels"].shape == inputs["input_ids"].shape:
        inputs["labels"].copy_(inputs["input_ids"])
    else:
        inputs["labels"].random_(0, vocab_size)
    return inputs


def vocab_size(model: Any) -> int:
    """Return how many ids a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def sites(model: Any) -> dict[str, str]:
    """Return what the modules outside the layers are called in the result, by dotted path."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = next(path for path, module in model.named_modules() if module is base)
    names = {
        id(base.get_input_embeddings()): "embeddings",
        id(base.get_output_embeddings()): "head",
    }
    found = {
        path: names[id(module)] for path, module in model.named_modules() if id(module) in names
    }
    decoder = getattr(base, base.base_model_prefix, base)
    for path, module in decoder.named_children():
        if "norm" in path or "ln_f" in path:
            place = next(name for name, other in model.named_modules() if other is module)
            found.setdefault(place, "final_norm")
    return {path: site for path, site in found.items() if path != prefix}


def notes(request: EstimateRequest, model: Any) -> tuple[str, ...]:
    """Return what was decided for the user while the model was built."""
    attention = str(model.config._attn_implementation)
    if attention == request.attention.partition("_")[0] or attention == request.attention:
        return ()
    return (
        f"attention: {type(model).__name__} has no {request.attention!r}; "
        f"transformers runs {attention!r}",
    )


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this request needs {name!r}, which is not installed; "
            f"run: pip install 'vramplan[profiler]' {name}"
        ) from error


def bare_model(request: EstimateRequest, config: Any) -> Any:
    """Return the causal language model on the meta device, in the dtype it is stored in."""
    torch, transformers = _import("torch"), _import("transformers")
    # transformers takes `sdpa` by itself where the model class has it and `eager` elsewhere; named
    # explicitly it raises instead.
    attention = None if request.attention.startswith("sdpa") else request.attention
    resolved = copy.deepcopy(config)
    if type(resolved) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"transformers has no causal language model for model_type {resolved.model_type!r}"
        )
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                resolved,
                dtype=getattr(torch, _STORED[request.precision]),
                attn_implementation=attention,
                trust_remote_code=False,
            )
    except Exception as error:
        # Each model class has its own way to fail on a configuration that it cannot build.
        raise InvalidConfigError(f"transformers refuses this model: {one_line(error)}") from error


def _quantized(model: Any, request: EstimateRequest) -> Any:
    """Replace the linear layers by packed ones, as `from_pretrained` does."""
    peft = _import("peft")
    assert request.quantization is not None
    _import(quantized.FORMATS[request.quantization.name].LIBRARY)
    model = quantized.with_packed_linears(model, request, _STORED[request.precision])
    if request.quantization.prepare_kbit:
        return peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=_checkpoints_layers(request)
        )
    return model


def _checkpoints_layers(request: EstimateRequest) -> bool:
    how = parse_checkpointing(request.activation_checkpointing)
    return how is not None and how.scope == "layers"


def _wrap_autocast(model: Any, dtype: str | None, device: str, *, converts: bool) -> None:
    """Wrap `forward` as `Accelerator.prepare_model` does: autocast inside, fp32 outputs outside.

    Args:
        converts: False for a loop that calls the model under `torch.autocast` itself.
    """
    if dtype is None:
        return
    torch, accelerate = _import("torch"), _import("accelerate.utils")
    context = torch.autocast(device_type=device.split(":")[0], dtype=getattr(torch, dtype))
    inside = context(model.forward)
    model.forward = accelerate.convert_outputs_to_fp32(inside) if converts else inside
