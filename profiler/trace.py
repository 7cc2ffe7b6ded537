"""What a traced training step allocated and freed, in order, and who owned each byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

from estimator.components import COMPONENTS, Component
from estimator.memory.caching_allocator import (
    DEFAULT_SETTINGS,
    MIN_BLOCK_BYTES,
    AllocatorSettings,
    CachingAllocator,
)
from estimator.units import round_up

LOAD: Final = "load"
# Making the batch is the first part of the forward phase; its tensors are told apart.
BATCH: Final = "batch"
FORWARD: Final = "forward"
LOSS_FORWARD: Final = "loss forward"
LOSS_BACKWARD: Final = "loss backward"
BACKWARD: Final = "backward"
GRADIENT_CLIPPING: Final = "gradient clipping"
OPTIMIZER_STEP: Final = "optimizer step"
# What follows is the pass that estimates the Hessian, until the next batch.
ESTIMATE_HESSIAN: Final = "estimate of the Hessian"
# The optimizer's work: from the end of backward on.
UPDATES: Final = (GRADIENT_CLIPPING, OPTIMIZER_STEP)
STEP_PHASES: Final = (FORWARD, LOSS_FORWARD, LOSS_BACKWARD, BACKWARD, *UPDATES)
HESSIAN_PHASES: Final = tuple(f"Hessian {phase}" for phase in STEP_PHASES)


@dataclass(frozen=True, slots=True)
class Storage:
    """One allocation: how large it is and where it comes from.

    Args:
        bytes: as requested from the allocator, before any rounding [bytes].
        shape: of the first tensor that was seen on this storage.
        module: dotted path, with the index of the layer written `*`.
        layer: index of the decoder layer that owns it, or None outside the layers.
        operator: the operator that allocated it; `parameter`, `buffer` or a kernel's workspace.
        site: where in the step it lives, in the words of the result document.
    """

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    component: Component
    phase: str
    module: str
    layer: int | None
    operator: str
    site: str

    @property
    def block_bytes(self) -> int:
        """Size of the block that holds it, rounded as the allocator rounds [bytes]."""
        return round_up(self.bytes, MIN_BLOCK_BYTES)


class Event(NamedTuple):
    """A storage is born or dies.

    Args:
        storage: index into `Trace.storages`.
        is_alloc: True at birth, False at death.
        phase: the phase of the step in which it happens.
        layer: the decoder layer that is being worked on, else the layer that owns the storage.
    """

    storage: int
    is_alloc: bool
    phase: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class Row:
    """Storages of one kind that are alive together."""

    component: Component
    site: str
    module: str
    operator: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Two training steps as an ordered list of births and deaths.

    Args:
        storages: every allocation, in order of birth.
        events: every birth and death, in order.
        steady_from: index of the first event of the second step, the one that is reported.
    """

    storages: tuple[Storage, ...]
    events: tuple[Event, ...]
    steady_from: int


@dataclass(frozen=True, slots=True)
class Point:
    """The highest point of one phase of the steady step.

    Args:
        event: index into `Trace.events`; the point is right after this event.
        requested_bytes: what the live storages asked for [bytes].
        block_bytes: the same, each rounded up to 512 bytes [bytes].
        allocated_bytes: what `memory_allocated` would read, whole blocks of the caching allocator.
    """

    phase: str
    event: int
    requested_bytes: int
    block_bytes: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A trace as the caching allocator saw it.

    Args:
        points: the highest point of each phase of the steady step, in the order of the phases.
        reserved_bytes: the most that the allocator held over both steps [bytes].
        pinned_bytes: the most of it in segments with something in them, which stay [bytes].
    """

    points: tuple[Point, ...]
    reserved_bytes: int
    pinned_bytes: int

    @property
    def peak(self) -> Point:
        """The highest point of the step; the earliest one of equals."""
        return max(self.points, key=lambda point: (point.allocated_bytes, -point.event))


def read(trace: Trace, settings: AllocatorSettings = DEFAULT_SETTINGS) -> Reading:
    """Replay a trace through the model of the caching allocator."""
    allocator = CachingAllocator(None, settings)
    requested = [storage.bytes for storage in trace.storages]
    blocks = [storage.block_bytes for storage in trace.storages]
    charged = [0] * len(trace.storages)
    live = live_blocks = allocated = 0
    best: dict[str, Point] = {}
    for index, event in enumerate(trace.events):
        storage = event.storage
        if not event.is_alloc:
            allocator.free(storage)
            live -= requested[storage]
            live_blocks -= blocks[storage]
            allocated -= charged[storage]
            # Falling memory is never a new peak, except for where a phase begins.
            if index < trace.steady_from or event.phase in best:
                continue
        else:
            charged[storage] = allocator.malloc(storage, requested[storage]).charged_bytes
            live += requested[storage]
            live_blocks += blocks[storage]
            allocated += charged[storage]
        if index < trace.steady_from:
            continue
        known = best.get(event.phase)
        if known is None or allocated > known.allocated_bytes:
            best[event.phase] = Point(event.phase, index, live, live_blocks, allocated)
    points = tuple(best[phase] for phase in (*STEP_PHASES, *HESSIAN_PHASES) if phase in best)
    stats = allocator.stats
    return Reading(points, stats.peak_reserved_bytes, stats.peak_pinned_bytes)


def live_storages(trace: Trace, event: int) -> list[Storage]:
    """Return the storages that are alive right after an event, in order of birth."""
    alive: dict[int, None] = {}
    for entry in trace.events[: event + 1]:
        if entry.is_alloc:
            alive[entry.storage] = None
        else:
            del alive[entry.storage]
    return [trace.storages[index] for index in alive]


def rows(trace: Trace, event: int) -> list[Row]:
    """Group what is alive right after an event; largest first, bytes as requested."""
    count: Counter[tuple[Component, str, str, str, str, tuple[int, ...]]] = Counter()
    size: Counter[tuple[Component, str, str, str, str, tuple[int, ...]]] = Counter()
    for storage in live_storages(trace, event):
        key = (
            storage.component,
            storage.site,
            storage.module,
            storage.operator,
            storage.dtype,
            storage.shape,
        )
        count[key] += 1
        size[key] += storage.bytes
    ordered = sorted(size, key=lambda key: (-size[key], key))
    return [Row(*key, count[key], size[key]) for key in ordered]


def component_bytes(trace: Trace, event: int) -> dict[Component, int]:
    """Return the requested bytes of each component right after an event [bytes]."""
    size = dict.fromkeys(COMPONENTS, 0)
    for storage in live_storages(trace, event):
        size[storage.component] += storage.bytes
    return size


def last_event_of(trace: Trace, phase: str) -> int | None:
    """Return the index of the steady step's last event in a phase, or None if it has none."""
    for index in range(len(trace.events) - 1, trace.steady_from - 1, -1):
        if trace.events[index].phase == phase:
            return index
    return None
