"""Run a request's workload on fake tensors: a few layers, written out to all of them."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.errors import EstimatorError, InvalidRequestError, UnsupportedCombinationError
from estimator.pipeline import device_of
from estimator.request import EstimateRequest
from estimator.resolve import check_gpu
from estimator.service import requested_gpu
from estimator.techniques.execution import parse_checkpointing
from profiler import (
    attention,
    checkpointing,
    kernels,
    methods,
    optimizers,
    quantized,
    stack,
    workload,
)
from profiler.cuda_semantics import cuda_semantics
from profiler.eager_transformers import eager_transformers
from profiler.engine import DryRun, Progress
from profiler.instrument import Meter
from profiler.trace import Trace
from profiler.unroll import NotPeriodicError, Shortening, unroll
from profiler.workspaces import Workspaces

# Compute capability and multiprocessors: what a request without a GPU is traced for.
_A100: Final = ((8, 0), 108)


def fake_run(
    request: EstimateRequest, config: dict[str, Any], *, progress: Progress, every_layer: bool
) -> DryRun:
    """Build the model, trace the short stack of layers, and write out the trace of all of them.

    Raises:
        EstimatorError: the run is not supported, or the real stack refuses it.
    """
    check_gpu(request, requested_gpu(request))
    progress(0.0, "building the model")
    with (
        warnings.catch_warnings(),
        quantized.quiet_imports(),
        eager_transformers(),
        contextlib.ExitStack() as patches,
    ):
        # The stack's warnings are about code that is not the user's.
        warnings.simplefilter("ignore")
        resolved = workload.model_config(config)
        patches.enter_context(kernels.restored(request, resolved.model_type))
        if not every_layer and not _names_layers(request) and not kernels.compiles(request):
            run = _from_few_layers(request, resolved, progress)
            if run is not None:
                return run
        return _run(workload.meta_model(request, resolved), request, None, progress)


def _from_few_layers(request: EstimateRequest, config: Any, progress: Progress) -> DryRun | None:
    """Return the run of the whole model from a short stack; None if no layer stands for others."""
    kinds = stack.kinds(workload.bare_model(request, config))
    how = stack.shortening(kinds)
    if not how.copies:
        return None
    shortened = stack.shortened(config, how)
    # A family that numbers its layers by a rule, and not in a list, may come out otherwise.
    if not stack.same_layers(kinds, workload.bare_model(request, shortened), how):
        return None
    short = workload.meta_model(request, shortened)
    try:
        return _run(short, request, how, progress)
    except NotPeriodicError:
        return None


def _run(
    model: Any, request: EstimateRequest, how: Shortening | None, progress: Progress
) -> DryRun:
    """Trace a model, and write out the layers that stand for others."""
    parameters = stack.parameters(model, how, methods.updated(model, request))
    traced, managed = _traced(model, request, how, progress)
    progress(0.9, "writing out all layers")
    whole = unroll(traced, how) if how else traced
    notes = (*workload.notes(request, model), *kernels.notes(request), *_notes(request))
    return DryRun(whole, parameters, notes, managed)


def _names_layers(request: EstimateRequest) -> bool:
    """Whether the recipe singles out layers by number, so that no layer stands for another."""
    if request.method.singles_out_layers:
        return True
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


def _notes(request: EstimateRequest) -> tuple[str, ...]:
    gpu = requested_gpu(request)
    if gpu is None or gpu.compute_capability.partition(".")[0].isdigit():
        return ()
    return (f"{gpu.name}: traced with the kernels of an A100; those of its own are not known here",)


def _traced(
    model: Any, request: EstimateRequest, how: Shortening | None, progress: Progress
) -> tuple[Trace, int]:
    """Run two steps of a meta model on fake tensors; return the trace and the managed memory."""
    capability, multiprocessors = _gpu(request)
    constants = device_of(requested_gpu(request), request).constants
    layers = stack.layers_path(model)
    with (
        _without_collection(),
        FakeTensorMode(),
        cuda_semantics(capability, _kernel(request)),
        quantized.on_cuda(),
        kernels.compiling(request),
        _refusals(),
    ):
        trained = stack.trained(model, how)
        job = workload.start(model, request, "cpu", capability, multiprocessors, trained.total())
        meter = Meter(
            layers=layers,
            workspaces=Workspaces(
                capability,
                multiprocessors,
                constants.cublas_workspace,
                trained,
            ),
        )
        optimizers.announce(job.optimizer, meter)
        hears = not kernels.compiles(request)
        with meter.watching(model, workload.sites(model), hears=hears), meter:
            for tensor in optimizers.kept_on_host(job.optimizer):
                meter.leave_out(tensor)
            for tensor, path, operator, component in workload.standing(job):
                meter.adopt(tensor, path, operator, component)
            which = f"{how.num_traced} of {how.num_layers} layers" if how else "all layers"
            how_checkpointed = parse_checkpointing(request.activation_checkpointing)
            with checkpointing.running(how_checkpointed, fake=True):
                progress(0.2, f"tracing {which}, first step")
                job.step(meter.phase)
                _own_states(meter, job.optimizer)
                meter.begin_steady_step()
                progress(0.6, f"tracing {which}, second step")
                job.step(meter.phase)
        return meter.recorded(), optimizers.managed_bytes(model, job.optimizer, layers, how)


def _kernel(request: EstimateRequest) -> attention.Backend | None:
    """Return the only kernel that attention may take, where the request names one.

    cuDNN's is traced as flash attention: what both save, and their workspaces, are alike
    (cudnn-frontend, CompositeSDPABackwardNode: dQ_accum, dK_fullhead, dV_fullhead, softmax_sum).
    """
    chosen: dict[str, attention.Backend] = {
        "sdpa_math": "math",
        "sdpa_efficient": "efficient",
        "sdpa_flash": "flash",
        "sdpa_cudnn": "flash",
    }
    return chosen.get(request.attention)


def _own_states(meter: Meter, optimizer: Any) -> None:
    """Give the optimizer's tensors to their parameters; forget those outside device memory."""
    for parameter, state in optimizer.state.items():
        for name, value in _tensors(state):
            on_host = optimizers.is_on_host(optimizer, parameter, name)
            if on_host or optimizers.is_managed(optimizer, parameter, name):
                meter.drop(value)
            else:
                meter.own(value, parameter, "optimizer_states")


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a parameter's state; SOAP keeps some of them in lists."""
    for name, value in state.items():
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, torch.Tensor):
                yield name, each


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the real stack says against a run into one clear line."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    )

    # torch logs what it raises; the one line that the user gets says it already.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except EstimatorError:
        raise
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
        NotImplementedError,
    ) as error:
        raise UnsupportedCombinationError(
            f"this model's step depends on values or operators that fake tensors do not have: "
            f"{workload.one_line(error)}"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise InvalidRequestError(
            f"the training step itself refuses this run: {workload.one_line(error)}"
        ) from error
    finally:
        log.setLevel(level)


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
