"""Kernels that replace parts of a real model's layers, run without the kernels themselves."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from estimator.request import EstimateRequest
from profiler import without_kernels
from profiler.without_kernels import Library, OnCuda

KERNELS: Final = ("liger",)

# What each of Liger's kernels is called where its patches are asked for it.
_LAYERS: Final = ("rope", "rms_norm", "swiglu", "geglu")
_LOSSES: Final = ("cross_entropy", "fused_linear_cross_entropy")


def liger() -> Library:
    """Return Liger without its kernels."""
    return without_kernels.library("liger_kernel", "transformers.monkey_patch")


def fit(model: Any, request: EstimateRequest) -> None:
    """Patch a model as `use_liger_kernel` does, but for the loss.

    Source: liger_kernel/transformers/monkey_patch.py, `_apply_liger_kernel_to_instance`.
    """
    if "liger" in request.kernels:
        with liger().present():
            patch = liger()["transformers.monkey_patch"]._apply_liger_kernel_to_instance
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
    request: EstimateRequest, compute_capability: tuple[int, int], multiprocessors: int
) -> Iterator[None]:
    """Let the kernels' code believe that it runs on a GPU."""
    if "liger" not in request.kernels:
        yield
        return
    library = liger()
    norm = library["ops.rms_norm"]
    backward = norm.rms_norm_backward
    properties = SimpleNamespace(multi_processor_count=multiprocessors)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        with (
            OnCuda("liger_kernel", compute_capability),
            mock.patch("torch.cuda.get_device_properties", return_value=properties),
            mock.patch.object(norm, "device_context", contextlib.nullcontext),
        ):
            return backward(*args, **kwargs)

    with library.present(), mock.patch.object(norm, "rms_norm_backward", on_cuda):
        yield
