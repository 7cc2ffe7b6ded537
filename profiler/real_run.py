"""Run a request's workload on tensors that have values, step by step, on any device."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from estimator.errors import MissingDependencyError, UnsupportedCombinationError
from estimator.request import TRL_WITHOUT_HEAD, EstimateRequest
from estimator.techniques.execution import parse_checkpointing
from estimator.techniques.fp8_backends.transformer_engine import TransformerEngine
from profiler.gauge import Gauge

SEED: Final = 0

Train = Callable[[Gauge, int], None]
"""Runs a number of steps and reports to a gauge."""

# What `torch.nn.attention.SDPBackend` calls the kernels that a request may name.
_BACKENDS: Final = {
    "sdpa_math": "MATH",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
}
# The package that transformers imports for an attention of its own name.
_PACKAGES: Final = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}


class Place(Protocol):
    """The device that steps run on.

    Args:
        name: as torch knows it.
        capability, multiprocessors: of the GPU.
    """

    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]: ...
    @property
    def multiprocessors(self) -> int: ...
    def synchronize(self) -> None:
        """Wait for all kernels."""


@contextlib.contextmanager
def prepared(request: EstimateRequest, config: dict[str, Any], place: Place) -> Iterator[Train]:
    """Do everything that needs no device, and yield what trains the model on one.

    Args:
        request: one single-GPU run.
        config: the model's config.json.
        place: touched by what is yielded only.

    Raises:
        EstimatorError: the run is not supported, or the real stack refuses it.
    """
    refuse_stand_ins(request)
    try:
        from profiler import kernels, quantized, workload
    except ImportError as error:
        raise MissingDependencyError(
            f"a measurement needs {error.name!r}; run: pip install {error.name}"
        ) from error
    with (
        warnings.catch_warnings(),
        quantized.quiet_imports(),
        _quiet_transformers(),
        contextlib.ExitStack() as patches,
    ):
        # The stack's warnings are about code that is not the user's.
        warnings.simplefilter("ignore")
        resolved = workload.model_config(config)
        patches.enter_context(kernels.restored(request, resolved.model_type))
        model = workload.meta_model(request, resolved, fake=False)
        gc.collect()
        yield lambda gauge, steps: _train(model, request, place, gauge, steps)


def _train(model: Any, request: EstimateRequest, place: Place, gauge: Gauge, steps: int) -> None:
    """Give a meta model its storage and train it for a number of steps."""
    import torch

    from profiler import workload

    torch.manual_seed(SEED)
    with _running(request):
        job = workload.start(
            model, request, place.name, place.capability, place.multiprocessors, fake=False
        )
        for _ in range(steps):
            gauge.begin_step()
            place.synchronize()
            began = time.perf_counter()
            job.step(gauge.phase)
            place.synchronize()
            gauge.end_step(time.perf_counter() - began)


@contextlib.contextmanager
def _running(request: EstimateRequest) -> Iterator[None]:
    """Switch on what a training script switches on outside the model."""
    import torch

    from profiler import checkpointing

    with contextlib.ExitStack() as stack:
        how = parse_checkpointing(request.activation_checkpointing)
        stack.enter_context(checkpointing.running(how, fake=False))
        if request.attention in _BACKENDS:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            backend = getattr(SDPBackend, _BACKENDS[request.attention])
            stack.enter_context(sdpa_kernel([backend]))
        before = torch.get_float32_matmul_precision()
        if request.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        stack.callback(torch.set_float32_matmul_precision, before)
        yield


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep advice to whoever writes a training script off the output."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_stand_ins(request: EstimateRequest) -> None:
    """Refuse by name what the dry run runs on a stand-in: measured, it would say nothing.

    Raises:
        UnsupportedCombinationError: with the field and the reason.
        MissingDependencyError: the package of an attention kernel is not installed.
    """
    for field, value, reason in _stand_ins(request):
        raise UnsupportedCombinationError(f"cannot measure {field}={value!r} yet: {reason}")
    package = _PACKAGES.get(request.attention)
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"attention={request.attention!r} needs {package!r}, which is not installed"
        )


def _stand_ins(request: EstimateRequest) -> Iterator[tuple[str, str, str]]:
    """Yield the fields whose library is not run here, with their value and the reason."""
    written = "its code is written down here for fake tensors, and is not the library's own"
    quantization = request.quantization.name if request.quantization is not None else ""
    fp8 = "te" if isinstance(request.fp8, TransformerEngine) else ""
    framework, version = request.software.framework, request.software.version
    fields = (
        ("method", request.method.name, ("houlsby_adapter", "pfeiffer_adapter", "loreft")),
        ("quantization", quantization, ("gptq", "awq", "hqq")),
        ("optimizer", request.optimizer.name, ("lowmem_adafactor",)),
        ("kernels", next(iter(request.kernels), ""), ("unsloth",)),
        ("fp8", fp8, ("te",)),
        ("software.version", version, TRL_WITHOUT_HEAD if framework == "trl" else ()),
    )
    for field, value, refused in fields:
        if value in refused:
            yield field, value, written
    if request.precision == "megatron_bf16":
        yield "precision", request.precision, "Megatron-LM keeps gradients in one buffer"
    if request.loop.ema not in (None, "cuda"):
        yield "loop.ema", str(request.loop.ema), "an average in host memory is not kept here"
