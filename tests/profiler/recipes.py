"""Traced runs that several tests look at; each is traced once."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from estimator.request import EstimateRequest, parse_request
from profiler import engine, trace
from profiler.engine import DryRun

# The first shape of the table of checked configurations: h = a = k = 1024, f = 2816, 16 heads.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32_000,
}
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def request(config: dict[str, Any], **fields: Any) -> EstimateRequest:
    return parse_request({"model": {"config": config}, "seq_len": 512, **fields})


def run(config: dict[str, Any], *, every_layer: bool = False, **fields: Any) -> DryRun:
    """Trace a run, or return it if it was traced before."""
    return _run(json.dumps(config), json.dumps(fields), every_layer)


def traced(config: dict[str, Any], *, every_layer: bool = False, **fields: Any) -> trace.Trace:
    return run(config, every_layer=every_layer, **fields).trace


@cache
def _run(config: str, fields: str, every_layer: bool) -> DryRun:
    asked = request(json.loads(config), **json.loads(fields))
    return engine.run(asked, json.loads(config), every_layer=every_layer)


def at_end_of_forward(step: trace.Trace) -> list[trace.Storage]:
    """Return what is alive when the loss has been computed."""
    event = trace.last_event_of(step, trace.LOSS_FORWARD)
    assert event is not None
    return trace.live_storages(step, event)


def live_at(step: trace.Trace, phase: str) -> list[trace.Storage]:
    """Return what is alive at the highest point of a phase."""
    point = next(point for point in trace.read(step).points if point.phase == phase)
    return trace.live_storages(step, point.event)
