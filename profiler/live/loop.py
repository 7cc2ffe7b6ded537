"""How a live run trains: autocast, checkpointing, attention, kernels, the loss, the software."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from estimator.request import TRL_WITHOUT_HEAD, EstimateRequest
from estimator.techniques.software import profile
from profiler.live.findings import Findings
from profiler.live.method import base_model

# The first version of each library that a profile of `estimator/techniques/software.py` holds for;
# None: nothing is known from there on, until the next row.
_PROFILES: Final[dict[str, tuple[tuple[tuple[int, int], str | None], ...]]] = {
    "transformers": (((4, 49), "5"), ((4, 46), "4"), ((0, 0), "4.45")),
    "trl": (
        ((1, 16), "1.16"), ((1, 6), None), ((1, 3), "1.3"), ((0, 27), "0.27"), ((0, 26), None),
        ((0, 22), "0.22"), ((0, 0), None),
    ),
}  # fmt: skip
_COMPILED: Final = {
    None: "compile",
    "default": "compile",
    "reduce-overhead": "compile_reduce_overhead",
    "max-autotune": "compile_max_autotune",
}
_ATTENTION: Final = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def software(args: Any, findings: Findings) -> dict[str, str]:
    """Return the section `software`: TRL's SFTTrainer or the Trainer itself, and its version."""
    of_trl = [each.__name__ for each in type(args).__mro__ if each.__module__.startswith("trl.")]
    framework = "trl" if of_trl else "transformers"
    if of_trl and "SFTConfig" not in of_trl:
        findings.unknown.append(f"the trainer of TRL's {of_trl[0]}; only SFTTrainer is described")
    installed = installed_version(framework)
    known = software_version(framework, installed)
    if known is None:
        findings.unknown.append(f"{framework} {installed}, whose loss was not compared")
        known = next(each for _, each in _PROFILES[framework] if each is not None)
    return {"framework": framework, "version": known}


def software_version(framework: str, installed: str) -> str | None:
    """Return the version of the request that an installed one is known to behave as.

    Example:
        >>> software_version("transformers", "4.51.3"), software_version("trl", "1.7.0")
        ('5', None)
    """
    numbers = [int(part) for part in installed.split(".")[:2] if part.isdigit()]
    here = (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
    return next(known for first, known in _PROFILES[framework] if here >= first)


def installed_version(package: str) -> str:
    """Return the version of an installed package, or an empty word."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def refuse_many_gpus(args: Any, model: Any, findings: Findings) -> None:
    """Name what spreads a run over devices; one GPU is described."""
    mode = str(getattr(args.parallel_mode, "value", args.parallel_mode))
    if args.n_gpu > 1 or args.world_size > 1:
        count = max(args.n_gpu, args.world_size)
        findings.unknown.append(f"{count} GPUs ({mode}); one GPU is described")
    if args.fsdp:
        findings.unknown.append("FSDP; one GPU is described")
    if args.deepspeed:
        findings.unknown.append("DeepSpeed; one GPU is described")
    places = getattr(base_model(model), "hf_device_map", None) or {}
    if len(set(map(str, places.values()))) > 1:
        findings.unknown.append(
            f"a model on several devices ({sorted(set(map(str, places.values())))})"
        )


def autocast(args: Any, findings: Findings) -> str | None:
    """Return the type that autocast computes in: Accelerate's, or what the arguments ask for."""
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:
        mixed = str(AcceleratorState().mixed_precision)
    else:
        mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if mixed == "fp8":
        findings.unknown.append("Accelerate's mixed precision 'fp8'")
    return mixed if mixed in ("bf16", "fp16") else None


def checkpointing(model: Any, software_section: dict[str, str], findings: Findings) -> str:
    """Return the word for the activation checkpointing that the model's layers have switched on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = base_model(model)
    layers = [each for each in base.modules() if isinstance(each, GradientCheckpointingLayer)]
    switched = [each.gradient_checkpointing for each in layers]
    if not layers:
        if any(getattr(each, "gradient_checkpointing", False) for each in base.modules()):
            findings.unknown.append(f"the activation checkpointing of {type(base).__name__}")
        return "none"
    if not any(switched):
        return "none"
    every = switched.index(True, 1) if True in switched[1:] else len(switched)
    if switched != [index % every == 0 for index in range(len(switched))]:
        findings.unknown.append("activation checkpointing of layers at no regular distance")
    settings = layers[0]._gradient_checkpointing_func
    keywords = dict(getattr(settings, "keywords", {}))
    offloads = getattr(settings, "func", settings).__name__ != "checkpoint"
    reentrant = keywords.pop("use_reentrant", True)
    keywords.pop("preserve_rng_state", None)
    if keywords:
        findings.unknown.append(f"activation checkpointing with {', '.join(sorted(keywords))}")
    default = profile(software_section["framework"], software_section["version"]).reentrant
    how = "" if reentrant == default else "_reentrant" if reentrant else "_nonreentrant"
    return f"{'full' if every == 1 else f'every_{every}'}{how}{'_offload' if offloads else ''}"


def attention(model: Any, findings: Findings) -> str:
    """Return the implementation of attention that the model runs."""
    name = str(base_model(model).config._attn_implementation)
    if name not in _ATTENTION:
        findings.unknown.append(f"attention {name!r}")
        return "sdpa"
    return name


def kernels_and_loss(
    args: Any, software_section: dict[str, str], findings: Findings
) -> tuple[list[str], str]:
    """Return the fields `kernels` and `loss`."""
    of_trl = software_section["framework"] == "trl"
    chunked = of_trl and software_section["version"] not in TRL_WITHOUT_HEAD
    kernels, loss = [], "chunked" if chunked else "standard"
    if args.use_liger_kernel:
        kernels.append("liger")
        settings = dict(args.liger_kernel_config or {})
        fused = settings.pop("fused_linear_cross_entropy", True)
        # Liger's own defaults: everything but its plain cross entropy.
        others = [name for name, on in settings.items() if on != (name != "cross_entropy")]
        if others:
            findings.unknown.append(f"liger_kernel_config with {', '.join(sorted(others))}")
        if fused and not chunked:
            loss = "fused_linear"
    if args.torch_compile:
        if args.torch_compile_mode not in _COMPILED:
            findings.unknown.append(f"torch_compile_mode {args.torch_compile_mode!r}")
        if args.torch_compile_backend not in (None, "inductor"):
            findings.unknown.append(f"torch_compile_backend {args.torch_compile_backend!r}")
        kernels.append(_COMPILED.get(args.torch_compile_mode, "compile"))
    if of_trl:
        _refuse_of_trl(args, findings)
    return kernels, loss


def _refuse_of_trl(args: Any, findings: Findings) -> None:
    loss = getattr(args, "loss_type", "nll")
    if loss not in ("nll", "chunked_nll"):
        findings.unknown.append(f"TRL's loss_type {loss!r}")
    if args.label_smoothing_factor:
        findings.unknown.append("label_smoothing_factor with SFTTrainer, a second forward pass")
    if getattr(args, "activation_offloading", False):
        findings.unknown.append("TRL's activation_offloading")


def loop(args: Any, model: Any, checkpointed: bool) -> dict[str, Any]:
    """Return the section `loop`: what the Trainer keeps alive, and what it does with gradients."""
    default = EstimateRequest(model="").loop
    section: dict[str, Any] = {}
    if args.neftune_noise_alpha is not None:
        section["neftune_noise_alpha"] = float(args.neftune_noise_alpha)
    if args.label_smoothing_factor:
        section["label_smoothing_factor"] = float(args.label_smoothing_factor)
    if not checkpointed and base_model(model).config.use_cache:
        section["use_cache"] = True
    norm = float(args.max_grad_norm or 0.0)
    if norm != default.max_grad_norm and (norm > 0 or not _measures_norm()):
        section["max_grad_norm"] = norm
    return section


def _measures_norm() -> bool:
    """Whether this transformers takes the norm of the gradients even where it clips nothing.

    Then `max_grad_norm` 0 needs the memory of any other.

    Source: transformers 5.23.0, trainer.py, Trainer._get_grad_norm.
    """
    import inspect

    from transformers import Trainer

    try:
        return "inf" in inspect.getsource(Trainer._get_grad_norm)
    except (AttributeError, OSError, TypeError):
        return False
