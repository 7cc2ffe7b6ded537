"""Kernels that replace parts of a real model's layers; fake tensors go without the kernels."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from estimator.errors import MissingDependencyError
from estimator.request import EstimateRequest
from profiler.without_kernels import Installed, Library, OnCuda, library

# What is run: none, or one of these by itself.
SETS: Final[tuple[tuple[str, ...], ...]] = ((), ("liger",), ("unsloth",), ("compile",))

# What each of Liger's kernels is called where its patches are asked for it.
_LAYERS: Final = ("rope", "rms_norm", "swiglu", "geglu")
_LOSSES: Final = ("cross_entropy", "fused_linear_cross_entropy")


def liger(*, fake: bool) -> Library | Installed:
    """Return Liger; for fake tensors, without its kernels."""
    return library("liger_kernel", "transformers.monkey_patch", fake=fake)


def fit(model: Any, request: EstimateRequest, *, fake: bool) -> None:
    """Patch a model as `use_liger_kernel` does, but for the loss.

    Source: liger_kernel/transformers/monkey_patch.py, `_apply_liger_kernel_to_instance`.
    """
    if "liger" in request.kernels:
        found = liger(fake=fake)
        with found.present():
            patch = found["transformers.monkey_patch"]._apply_liger_kernel_to_instance
            patch(model, **dict.fromkeys(_LAYERS, True), **dict.fromkeys(_LOSSES, False))


@contextlib.contextmanager
def restored(request: EstimateRequest, model_type: str) -> Iterator[None]:
    """Give transformers' module back what the patches of one run have replaced in it."""
    if "liger" not in request.kernels:
        yield
        return
    folder = model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


@contextlib.contextmanager
def running(
    request: EstimateRequest,
    compute_capability: tuple[int, int],
    multiprocessors: int,
    *,
    fake: bool,
) -> Iterator[None]:
    """Let the kernels' code believe that it runs on a GPU, where the tensors are fake."""
    if "liger" not in request.kernels or not fake:
        yield
        return
    found = liger(fake=True)
    norm = found["ops.rms_norm"]
    backward = norm.rms_norm_backward
    properties = SimpleNamespace(multi_processor_count=multiprocessors)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        with (
            OnCuda("liger_kernel", compute_capability),
            mock.patch("torch.cuda.get_device_properties", return_value=properties),
            mock.patch.object(norm, "device_context", contextlib.nullcontext),
        ):
            return backward(*args, **kwargs)

    with found.present(), mock.patch.object(norm, "rms_norm_backward", on_cuda):
        yield


def compiles(request: EstimateRequest) -> bool:
    """Whether the model is compiled."""
    return "compile" in request.kernels


def notes(request: EstimateRequest) -> tuple[str, ...]:
    """Return what a compiled dry run leaves out."""
    if not compiles(request):
        return ()
    return (
        "torch.compile: traced as compiled, with nothing tuned or padded for the card; dynamo runs "
        "the eager step, which may need more, where it has compiled too many shapes",
    )


def compile_model(
    model: Any,
    request: EstimateRequest,
    compute_capability: tuple[int, int],
    multiprocessors: int,
    *,
    fake: bool,
) -> None:
    """Compile a model in place, whole, as `torch_compile=True` does.

    Source: accelerate, accelerator.py, Accelerator.prepare_model: `torch.compile(model)` comes
    last, behind autocast, unless `use_regional_compilation` is set.
    """
    if compiles(request):
        if importlib.util.find_spec("triton") is None:
            raise MissingDependencyError(
                "torch.compile needs 'triton', in whose language inductor writes its kernels; "
                "run: pip install --no-deps triton"
            )
        if not fake:
            model.compile()
            return
        from profiler import inductor

        model.compile(backend=inductor.Backend(compute_capability, multiprocessors))


@contextlib.contextmanager
def compiling(request: EstimateRequest) -> Iterator[None]:
    """Let what is compiled be compiled afresh, and forgotten afterwards."""
    if not compiles(request):
        yield
        return
    from profiler import inductor

    with inductor.compiling():
        yield
