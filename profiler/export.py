"""A trace in the forms that people look at: events for a viewer, a series for a picture."""

from __future__ import annotations

from collections.abc import Iterator

from estimator.components import COMPONENTS
from profiler.picture import Series
from profiler.trace import Storage, Trace
from profiler.trace_export import TraceEvent

# A picture has some hundred columns; more moments than this only cost time.
_MAX_MOMENTS = 2000


def viewer_events(trace: Trace) -> Iterator[TraceEvent]:
    """Yield the births and deaths of both steps in the form that `write_trace` takes."""
    for event in trace.events:
        storage = trace.storages[event.storage]
        yield TraceEvent(
            kind="alloc" if event.is_alloc else "free",
            key=event.storage,
            size_bytes=storage.bytes,
            stream=0,
            component=storage.component,
            phase=event.phase,
            module=module_path(storage),
            operator=storage.operator,
        )


def module_path(storage: Storage) -> str:
    """Return the module path with the number of its layer in its place."""
    if storage.layer is None:
        return storage.module
    return storage.module.replace("*", str(storage.layer), 1)


def series(trace: Trace) -> Series:
    """Return the requested bytes of each component over the steady step.

    Of a long step, the moment with the most bytes of each stretch stands for the stretch.
    """
    live: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    total = 0
    steady = len(trace.events) - trace.steady_from
    stretch = max(1, steady // _MAX_MOMENTS)
    moments: list[str] = []
    columns: list[dict[str, int]] = []
    highest = -1
    for index, event in enumerate(trace.events):
        storage = trace.storages[event.storage]
        change = storage.bytes if event.is_alloc else -storage.bytes
        live[storage.component] += change
        total += change
        at = index - trace.steady_from
        if at < 0:
            continue
        if at % stretch == 0:
            moments.append(event.phase)
            columns.append(dict(live))
            highest = total
        elif total > highest:
            moments[-1], columns[-1], highest = event.phase, dict(live), total
    return Series(
        tuple(moments), {name: tuple(column[name] for column in columns) for name in COMPONENTS}
    )
