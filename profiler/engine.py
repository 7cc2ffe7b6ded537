"""The dry run: two real training steps on fake tensors, and the result document they give."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from estimator.errors import MissingDependencyError
from estimator.pipeline import device_of
from estimator.request import EstimateRequest
from estimator.result import Parameters, Result
from estimator.service import requested_gpu
from profiler.trace import Trace
from profiler.unroll import NotPeriodicError, Shortening, unroll

# Called with the share of the work that is done, from 0 to 1, and with what is being done.
Progress = Callable[[float, str], None]

# Compute capability and multiprocessors: what a request without a GPU is traced for.
_A100: Final = ((8, 0), 108)


@dataclass(frozen=True, slots=True)
class DryRun:
    """What was learnt from a traced run.

    Args:
        trace: both steps, over all layers of the model.
        parameters: counted on the whole model; tied tensors once.
        notes: what was decided for the user on the way.
        managed_bytes: optimizer states in CUDA managed memory, outside torch's counters [bytes].
    """

    trace: Trace
    parameters: Parameters
    notes: tuple[str, ...]
    managed_bytes: int


def trace(
    request: EstimateRequest,
    config: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    every_layer: bool = False,
) -> Trace:
    """Trace two steps of a request's run; the second one is the one that is reported.

    Args:
        request: one single-GPU run.
        config: the model's config.json.
        progress: told how far the work is.
        every_layer: trace every decoder layer instead of a few that stand for all.

    Raises:
        EstimatorError: the run is not supported, refused by the real stack, or torch is missing.
    """
    return run(request, config, progress=progress, every_layer=every_layer).trace


def dry_run(
    request: EstimateRequest, config: Mapping[str, Any], *, progress: Progress | None = None
) -> Result:
    """Answer a request by running its training step on fake tensors.

    Raises:
        EstimatorError: the run is not supported, refused by the real stack, or torch is missing.
    """
    from profiler.document import result

    return result(request, run(request, config, progress=progress))


def run(
    request: EstimateRequest,
    config: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    every_layer: bool = False,
) -> DryRun:
    """Build the model, trace the short stack of layers, and write out the trace of all of them."""
    _require_torch()
    from profiler import stack, workload

    report = progress or (lambda share, text: None)
    report(0.0, "building the model")
    with warnings.catch_warnings(), eager_transformers():
        # The stack's warnings are about code that is not the user's.
        warnings.simplefilter("ignore")
        resolved = workload.model_config(dict(config))
        if not every_layer and not _names_layers(request):
            kinds = stack.kinds(workload.bare_model(request, resolved))
            how = stack.shortening(kinds)
            if how.copies:
                short = workload.meta_model(request, stack.shortened(resolved, how))
                # A family that numbers its layers in a rule, not in a list, may come out otherwise.
                if stack.same_layers(kinds, workload.bare_model(request, short.config), how):
                    report(0.2, f"tracing {how.num_traced} of {how.num_layers} layers")
                    with contextlib.suppress(NotPeriodicError):
                        return _dry_run(short, request, how)
        report(0.2, "tracing every layer")
        return _dry_run(workload.meta_model(request, resolved), request, None)


def _dry_run(model: Any, request: EstimateRequest, how: Shortening | None) -> DryRun:
    """Trace a model, and write out the layers that stand for others."""
    from profiler import stack, workload

    parameters = stack.parameters(model, how)
    notes = workload.notes(request, model)
    traced, managed = _traced(model, request, how)
    return DryRun(unroll(traced, how) if how else traced, parameters, notes, managed)


def _names_layers(request: EstimateRequest) -> bool:
    """Whether the recipe singles out layers by number, so that no layer stands for another."""
    targets = getattr(request.method, "target_modules", ())
    saved = getattr(request.method, "modules_to_save", ())
    names = (*saved, *(targets if isinstance(targets, tuple) else ()))
    return any(part.isdigit() for name in names for part in name.split("."))


def _gpu(request: EstimateRequest) -> tuple[tuple[int, int], int]:
    """Return compute capability and multiprocessors of the requested GPU, else those of an A100."""
    gpu = requested_gpu(request)
    major, _, minor = (gpu.compute_capability if gpu else "").partition(".")
    if gpu is None or not major.isdigit():
        return _A100
    return (int(major), int(minor)), gpu.multiprocessors or _A100[1]


def _traced(model: Any, request: EstimateRequest, how: Shortening | None) -> tuple[Trace, int]:
    """Run two steps of a meta model on fake tensors; return the trace and the managed memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    capability, multiprocessors = _gpu(request)
    constants = device_of(requested_gpu(request), request).constants
    layers = stack.layers_path(model)
    with _without_collection(), FakeTensorMode(), cuda_semantics(capability):
        job = workload.start(model, request, "cpu")
        meter = Meter(
            layers=layers,
            workspaces=Workspaces(capability, multiprocessors, constants.cublas_workspace),
        )
        with meter.watching(model, workload.sites(model)), meter:
            for path, tensor, operator, component in workload.standing(job):
                meter.adopt(tensor, path, operator, component)
            job.step(meter.phase)
            _own_states(meter, job.optimizer)
            meter.begin_steady_step()
            job.step(meter.phase)
        return meter.trace(), optimizers.managed_bytes(model, job.optimizer, layers, how)


def _own_states(meter: Any, optimizer: Any) -> None:
    """Give the optimizer's tensors to their parameters; forget those outside device memory."""
    import torch

    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if optimizers.is_on_host(optimizer, name):
                meter.drop(value)
            elif optimizers.is_managed(optimizer, parameter, name):
                meter.drop(value)
            else:
                meter.own(value, parameter, "optimizer_states")


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing tensors at moments of its own choice."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
