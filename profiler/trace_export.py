"""An allocation trace as a file that PyTorch's memory viewer or Perfetto opens.

- `.pickle`: the snapshot of `torch.cuda.memory._dump_snapshot`, for the viewer at
  pytorch.org/memory_viz and for `python -m torch.cuda._memory_viz`. Blocks and segments have the
  addresses that the model of the caching allocator gave them, so the viewer's picture of
  fragmentation is the predicted one.
- `.json`: Chrome trace events for Perfetto and chrome://tracing: one counter for each component,
  `allocated` and `reserved`, the phases as slices, every allocation and free as an instant.

A fake run has no clock: what stands as microseconds is the number of the event.

Source: the snapshot's form is `torch/cuda/memory.py::_snapshot` at torch 2.13.0; what the viewer
reads of it is pytorch/pytorch `torch/utils/viz/MemoryViz.js` at commit 00067369c933.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

from estimator.errors import InvalidRequestError
from estimator.memory.caching_allocator import (
    DEFAULT_SETTINGS,
    Allocation,
    AllocatorSettings,
    CachingAllocator,
    Segment,
    SegmentEvent,
    Stats,
)
from profiler.whole_file import write_whole

# The viewer's unpickler reads protocols 2 to 4: MemoryViz.js::unpickle.
PICKLE_PROTOCOL: Final = 4
# A viewer of July 2024 stops with an error when a trace has categories and none is `unknown`
# (MemoryViz.js::annotate_snapshot at 00067369c933), so segments, which belong to nobody, are it.
UNKNOWN_CATEGORY: Final = "unknown"
DEFAULT_POOL_ID: Final = (0, 0)


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One allocation or free, in the order in which it happened.

    Args:
        kind: `alloc` or `free`.
        key: names the allocation from its `alloc` to its `free`; may be used again afterwards.
        size_bytes: what was asked for; read from the `alloc` only.
        stream: of the allocation; read from the `alloc` only.
        component: whose bytes they are, such as `activations`; read from the `alloc` only.
        phase: part of the step in which this event happens, such as `forward`.
        module: path of the module that was running, such as `model.layers.0.mlp`.
        operator: operator that was running, such as `aten.mm`.
    """

    kind: Literal["alloc", "free"]
    key: int
    size_bytes: int
    stream: int
    component: str
    phase: str
    module: str
    operator: str


@dataclass(frozen=True, slots=True)
class _Step:
    """An event with what the allocator did about it."""

    event: TraceEvent
    origin: TraceEvent  # the alloc that this free ends; the event itself for an alloc
    block: Allocation
    exchanges: Sequence[SegmentEvent]
    stats: Stats


def write_trace(
    path: Path, trace: Iterable[TraceEvent], settings: AllocatorSettings = DEFAULT_SETTINGS
) -> None:
    """Write the trace in the format that the suffix names; the file appears whole or not at all.

    Raises:
        InvalidRequestError: the suffix is neither .pickle nor .json, with or without .gz.
        ValueError: an event frees what is not allocated, or allocates a key twice.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[:-1][-1:] if compressed else suffixes[-1:])
    if suffix == ".pickle":
        content = pickle.dumps(memory_snapshot(trace, settings), protocol=PICKLE_PROTOCOL)
    elif suffix == ".json":
        content = json.dumps(chrome_trace(trace, settings), separators=(",", ":")).encode()
    else:
        raise InvalidRequestError(
            f"cannot tell the trace format from {path.name!r}; end it with .pickle for PyTorch's "
            "memory viewer or .json for Perfetto, and .gz after it to compress"
        )
    write_whole(path, _gzip(content) if compressed else content)


def memory_snapshot(
    trace: Iterable[TraceEvent], settings: AllocatorSettings = DEFAULT_SETTINGS
) -> dict[str, Any]:
    """Return the snapshot of PyTorch's memory viewer: segments at the end, and the trace."""
    allocator = CachingAllocator(settings=settings)
    entries: list[dict[str, Any]] = []
    live: dict[Hashable, TraceEvent] = {}
    for time, step in enumerate(_steps(trace, allocator)):
        entries += (_segment_entry(exchange, step.event, time) for exchange in step.exchanges)
        if not step.block.charged_bytes:
            continue
        if step.event.kind == "alloc":
            live[step.event.key] = step.event
            entries.append(_entry("alloc", step, time))
        else:
            del live[step.event.key]
            entries += (
                _entry(action, step, time) for action in ("free_requested", "free_completed")
            )
    return {
        "segments": [_segment(segment, live) for segment in allocator.segments()],
        "device_traces": [entries],
        "allocator_settings": {
            "expandable_segments": settings.expandable_segments,
            "max_split_size": -1
            if settings.max_split_size_bytes is None
            else settings.max_split_size_bytes,
        },
    }


def chrome_trace(
    trace: Iterable[TraceEvent], settings: AllocatorSettings = DEFAULT_SETTINGS
) -> dict[str, Any]:
    """Return the Chrome trace: counters, phases and instants, one microsecond for each event."""
    events: list[dict[str, Any]] = [
        _label("process_name", thread=0, name="predicted GPU memory"),
        _label("thread_name", thread=0, name="phase"),
        _label("thread_name", thread=1, name="allocations"),
    ]
    components: dict[str, int] = {}
    steps = list(_steps(trace, CachingAllocator(settings=settings)))
    for time, step in enumerate(steps):
        component, signed = step.origin.component, step.block.charged_bytes
        if step.event.kind == "free":
            signed = -signed
        components[component] = components.get(component, 0) + signed
        events.append(_counter(component, components[component], time))
        events.append(_counter("allocated", step.stats.allocated_bytes, time))
        if step.exchanges:
            events.append(_counter("reserved", step.stats.reserved_bytes, time))
        events.append(_instant(step, time))
    events += _phases([step.event.phase for step in steps])
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _steps(trace: Iterable[TraceEvent], allocator: CachingAllocator) -> Iterator[_Step]:
    blocks: dict[int, tuple[TraceEvent, Allocation]] = {}
    for event in trace:
        seen = len(allocator.segment_events)
        if event.kind == "alloc":
            block = allocator.malloc(event.key, event.size_bytes, event.stream)
            blocks[event.key] = event, block
            origin = event
        else:
            allocator.free(event.key)
            origin, block = blocks.pop(event.key)
        yield _Step(event, origin, block, allocator.segment_events[seen:], allocator.stats)


# One list for each place in the model: pickle writes a shared object once, which is what keeps
# the file of a long trace small.
@lru_cache(maxsize=65_536)
def _stack(module: str, operator: str, phase: str) -> list[dict[str, Any]]:
    path = module.split(".") if module else []
    modules = (".".join(path[:depth]) for depth in range(len(path), 0, -1))
    return [
        {"filename": module or phase, "line": 0, "name": operator},
        *({"filename": "module", "line": 0, "name": name} for name in modules),
        {"filename": "phase", "line": 0, "name": phase},
    ]


def _frames(event: TraceEvent) -> list[dict[str, Any]]:
    """Return the stack of an event, innermost first: operator, modules outwards, phase."""
    return _stack(event.module, event.operator, event.phase)


def _entry(action: str, step: _Step, time: int) -> dict[str, Any]:
    return {
        "action": action,
        "addr": step.block.address,
        "size": step.origin.size_bytes,
        "stream": step.origin.stream,
        "pool_id": DEFAULT_POOL_ID,
        "time_us": time,
        "frames": _frames(step.event),
        "category": step.origin.component or UNKNOWN_CATEGORY,
    }


def _segment_entry(exchange: SegmentEvent, cause: TraceEvent, time: int) -> dict[str, Any]:
    return {
        "action": exchange.kind,
        "addr": exchange.address,
        "size": exchange.size_bytes,
        "stream": exchange.stream,
        "pool_id": DEFAULT_POOL_ID,
        "time_us": time,
        "frames": _frames(cause),
        "category": UNKNOWN_CATEGORY,
    }


def _segment(segment: Segment, live: dict[Hashable, TraceEvent]) -> dict[str, Any]:
    in_use = [block for block in segment.blocks if block.state != "inactive"]
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size_bytes,
        "allocated_size": sum(block.size_bytes for block in in_use),
        "active_size": sum(block.size_bytes for block in in_use),
        "requested_size": sum(block.requested_bytes for block in in_use),
        "stream": segment.stream,
        "segment_type": "small" if segment.is_small else "large",
        "segment_pool_id": DEFAULT_POOL_ID,
        "is_expandable": segment.is_expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size_bytes,
                "requested_size": block.requested_bytes,
                "state": block.state,
                "frames": [] if block.key is None else _frames(live[block.key]),
            }
            for block in segment.blocks
        ],
    }


def _label(kind: str, *, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": thread, "args": {"name": name}}


def _counter(name: str, value: int, time: int) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": 0, "ts": time, "args": {"bytes": value}}


def _instant(step: _Step, time: int) -> dict[str, Any]:
    return {
        "ph": "i",
        "s": "t",
        "name": f"{step.event.kind} {step.origin.operator}",
        "cat": step.origin.component,
        "pid": 0,
        "tid": 1,
        "ts": time,
        "args": {
            "module": step.event.module,
            "operator": step.event.operator,
            "requested_bytes": step.origin.size_bytes,
            "charged_bytes": step.block.charged_bytes,
            "stream": step.origin.stream,
        },
    }


def _phases(phases: Sequence[str]) -> Iterator[dict[str, Any]]:
    start = 0
    for phase, run in groupby(phases):
        length = sum(1 for _ in run)
        yield {
            "ph": "X", "name": phase, "pid": 0, "tid": 0, "ts": start, "dur": length,
        }  # fmt: skip
        start += length


def _gzip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    # Neither a name nor a time, so that the same trace gives the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(content)
    return buffer.getvalue()
