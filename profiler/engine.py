"""The dry run: two real training steps on fake tensors, and the result document they give."""

from __future__ import annotations

from typing import Any

from estimator.request import EstimateRequest
from profiler import trace as tracing


def trace_full(request: EstimateRequest, config: dict[str, Any]) -> tracing.Trace:
    """Trace every layer."""
    import gc

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from profiler import workload
    from profiler.cuda_semantics import cuda_semantics
    from profiler.instrument import Meter
    from profiler.workspaces import Workspaces

    capability = (8, 0)
    gc.collect()
    gc.disable()
    try:
        model = workload.meta_model(request, config)
        with FakeTensorMode(), cuda_semantics(capability), eager_transformers():
            job = workload.start(model, request, "cpu")
            meter = Meter(layers=layer_list(job.model), workspaces=Workspaces(capability))
            for path, parameter in job.model.named_parameters():
                meter.adopt(parameter, path, "parameter", "weights")
            for path, buffer in job.model.named_buffers():
                meter.adopt(buffer, path, "buffer", "buffers")
            with meter.watching(job.model), meter:
                job.step(meter.phase)
                classify(meter, job.optimizer)
                meter.begin_steady_step()
                job.step(meter.phase)
                classify(meter, job.optimizer)
            return meter.trace()
    finally:
        gc.enable()


def classify(meter: Any, optimizer: Any) -> None:
    import torch

    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if name == "step" and not optimizer.defaults.get("fused"):
                meter.drop(value)
            else:
                meter.own(value, parameter, "optimizer_states")


def layer_list(model: Any) -> str | None:
    import torch

    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return path
    return None


import contextlib


@contextlib.contextmanager
def eager_transformers():
    from transformers.utils import import_utils

    original = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = original
