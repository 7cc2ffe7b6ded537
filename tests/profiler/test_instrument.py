"""The instrument against torch's own record of a real step on real tensors."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.request import EstimateRequest
from profiler import stack, workload
from profiler.eager_transformers import eager_transformers
from profiler.instrument import Meter
from tests.profiler.recipes import TINY, request

# Smaller tensors are scalars and kernels' own odds and ends.
SMALLEST_BYTES = 1024

RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (TINY, {}),
    "tied head, foreach": (
        {**TINY, "tie_word_embeddings": True},
        {"optimizer": "adamw_torch"},
    ),
    "one tensor at a time": (TINY, {"optimizer": {"name": "adamw", "implementation": "single"}}),
    "lora": (TINY, {"method": "lora"}),
    "bf16": (TINY, {"precision": "bf16"}),
    "accumulation": (TINY, {"gradient_accumulation_steps": 3}),
    "outputs kept, cache filled": (TINY, {"loop": {"keep_outputs": True, "use_cache": True}}),
    "padding": (TINY, {"padding": True}),
    "qwen3": ({**TINY, "model_type": "qwen3", "head_dim": 16}, {}),
    "gemma2": ({**TINY, "model_type": "gemma2", "head_dim": 16}, {}),
    "phi3": ({**TINY, "model_type": "phi3", "pad_token_id": 0}, {}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_births_and_deaths_are_those_that_torch_records_of_a_real_step(recipe: str) -> None:
    config, fields = RECIPES[recipe]
    asked = request(config, **{"precision": "fp32", "attention": "eager", "seq_len": 64, **fields})
    real, traced = _recorded(asked, config), _traced(asked, config)
    assert _grouped(traced) == _grouped(real)
    assert _peak(traced) == pytest.approx(_peak(real), abs=SMALLEST_BYTES)


def test_a_trace_without_the_rule_for_sums_of_gradients_is_larger_than_the_real_step() -> None:
    # Autograd copies where it would overwrite, only because a dispatch mode is active.
    asked = request(TINY, precision="fp32", attention="eager", seq_len=64)
    real = _recorded(asked, TINY)
    assert _born(_traced(asked, TINY, in_place_accumulation=False)) > _born(real)


def _recorded(asked: EstimateRequest, config: dict[str, Any]) -> list[int]:
    """Return the changes of memory in the second real step, in order [bytes].

    Without oneDNN, which repacks half-precision products on some processors and not on others.
    """
    with _prepared(asked, config) as model, torch.backends.mkldnn.flags(enabled=False):
        job = workload.start(model, asked, "cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        job.step(lambda _: None)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            job.step(lambda _: None)
    events = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def _traced(
    asked: EstimateRequest, config: dict[str, Any], *, in_place_accumulation: bool = True
) -> list[int]:
    """Return the changes of memory in the second step on fake tensors, without CUDA's ways."""
    with _prepared(asked, config) as model, FakeTensorMode():
        job = workload.start(model, asked, "cpu")
        meter = Meter(layers=stack.layers_path(model), in_place_accumulation=in_place_accumulation)
        with meter.watching(model, {}), meter:
            for tensor, path, operator, component in workload.standing(job):
                meter.adopt(tensor, path, operator, component)
            job.step(meter.phase)
            meter.begin_steady_step()
            job.step(meter.phase)
        trace = meter.recorded()
    return [
        trace.storages[event.storage].bytes * (1 if event.is_alloc else -1)
        for event in trace.events[trace.steady_from :]
    ]


@contextlib.contextmanager
def _prepared(asked: EstimateRequest, config: dict[str, Any]) -> Iterator[Any]:
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings(), eager_transformers():
            warnings.simplefilter("ignore")
            yield workload.meta_model(asked, workload.model_config(config))
    finally:
        gc.enable()


def _grouped(changes: list[int]) -> list[tuple[int, ...]]:
    """Return runs of births and runs of deaths; within a run the order does not matter."""
    large = [change for change in changes if abs(change) >= SMALLEST_BYTES]
    return [tuple(sorted(run)) for _, run in groupby(large, key=lambda change: change > 0)]


def _peak(changes: list[int]) -> int:
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _born(changes: list[int]) -> int:
    return sum(change for change in changes if change >= SMALLEST_BYTES)
