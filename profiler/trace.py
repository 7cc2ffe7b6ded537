"""What a traced training step allocated and freed, in order, and who owned each byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

from estimator.components import COMPONENTS, Component
from estimator.units import round_up

# c10/core/AllocatorConfig.h, kMinBlockSize: every block of the CUDA caching allocator is a
# multiple of this many bytes.
BLOCK_BYTES: Final = 512

LOAD: Final = "load"
FORWARD: Final = "forward"
LOSS_FORWARD: Final = "loss forward"
LOSS_BACKWARD: Final = "loss backward"
BACKWARD: Final = "backward"
OPTIMIZER_STEP: Final = "optimizer step"
STEP_PHASES: Final = (FORWARD, LOSS_FORWARD, LOSS_BACKWARD, BACKWARD, OPTIMIZER_STEP)


@dataclass(frozen=True, slots=True)
class Storage:
    """One allocation: how large it is and where it comes from.

    Args:
        bytes: as requested from the allocator, before any rounding [bytes].
        shape: of the first tensor that was seen on this storage.
        module: dotted path, with the index of the layer written `*`.
        layer: index of the decoder layer that owns it, or None outside the layers.
        operator: the operator that allocated it; `parameter`, `buffer` or a kernel's workspace.
    """

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    component: Component
    phase: str
    module: str
    layer: int | None
    operator: str

    @property
    def block_bytes(self) -> int:
        """Size of the block that holds it, rounded as the allocator rounds [bytes]."""
        return round_up(self.bytes, BLOCK_BYTES)


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


class Row(NamedTuple):
    """Storages of one kind that are alive together."""

    component: Component
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
class PhasePeak:
    """The highest point of one phase of the steady step.

    Args:
        event: index into `Trace.events`; the point is right after this event.
        bytes: allocated bytes, each storage rounded up to whole blocks [bytes].
        requested_bytes: the same storages without rounding [bytes].
    """

    phase: str
    event: int
    bytes: int
    requested_bytes: int


def phase_peaks(trace: Trace) -> tuple[PhasePeak, ...]:
    """Return the highest point of each phase of the steady step, in the order of the phases."""
    live = requested = 0
    best: dict[str, PhasePeak] = {}
    blocks = [storage.block_bytes for storage in trace.storages]
    for index, event in enumerate(trace.events):
        sign = 1 if event.is_alloc else -1
        live += sign * blocks[event.storage]
        requested += sign * trace.storages[event.storage].bytes
        if index >= trace.steady_from and (
            event.phase not in best or live > best[event.phase].bytes
        ):
            best[event.phase] = PhasePeak(event.phase, index, live, requested)
    return tuple(best[phase] for phase in STEP_PHASES if phase in best)


def peak(trace: Trace) -> PhasePeak:
    """Return the highest point of the steady step; the earliest one of equals."""
    return max(phase_peaks(trace), key=lambda point: (point.bytes, -point.event))


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
    """Group what is alive right after an event; largest first, bytes rounded to whole blocks."""
    count: Counter[tuple[Component, str, str, str, tuple[int, ...]]] = Counter()
    size: Counter[tuple[Component, str, str, str, tuple[int, ...]]] = Counter()
    for storage in live_storages(trace, event):
        key = (
            storage.component,
            storage.module,
            storage.operator,
            storage.dtype,
            storage.shape,
        )
        count[key] += 1
        size[key] += storage.block_bytes
    ordered = sorted(size, key=lambda key: (-size[key], key))
    return [Row(*key, count[key], size[key]) for key in ordered]


def component_bytes(trace: Trace, event: int) -> dict[Component, int]:
    """Return the allocated bytes of each component right after an event [bytes]."""
    size = dict.fromkeys(COMPONENTS, 0)
    for storage in live_storages(trace, event):
        size[storage.component] += storage.block_bytes
    return size


def last_event_of(trace: Trace, phase: str) -> int | None:
    """Return the index of the steady step's last event in a phase, or None if it has none."""
    for index in range(len(trace.events) - 1, trace.steady_from - 1, -1):
        if trace.events[index].phase == phase:
            return index
    return None
