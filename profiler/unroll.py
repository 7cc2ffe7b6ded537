"""Trace a few decoder layers and write out the trace of all of them, exactly.

A stack of layers that repeats with a period does the same work again and again: layer `i + period`
allocates and frees what layer `i` did, one period later. So the trace of a short stack already
holds every event of the long one. `unroll` cuts a short trace at the borders of layers, repeats the
events of one period in the middle, and renumbers. Before it does so it checks that neighbouring
periods of the short trace are indeed the same; if they are not, it refuses, and the caller traces
a longer stack.

    layers     0 | 1 | 2 | 3 | 4           short trace, period 1
                       ^ template: repeated, with layers 1 and 3 as the neighbours it refers to
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

from profiler.trace import Event, Storage, Trace

# A template has a regular layer on each side, because layers refer to their neighbours' tensors;
# behind the upper one stands the last layer, whose output is the final norm's input.
_NEIGHBOURS: Final = 1
_TAIL: Final = _NEIGHBOURS + 1


_Entry = TypeVar("_Entry")


class NotPeriodicError(Exception):
    """Neighbouring layers of the short trace do not do the same work."""


@dataclass(frozen=True, slots=True)
class Shortening:
    """How a stack of layers is shortened: periods are left out behind the template.

    Args:
        num_layers: of the model.
        period: layers after which the stack repeats.
        head: index of the first layer of the template.
        num_traced: layers of the short stack.
    """

    num_layers: int
    period: int
    head: int
    num_traced: int

    @classmethod
    def of(cls, num_layers: int, *, period: int, irregular: int = 1) -> Shortening:
        """Return the shortest stack that holds the irregular first layers and a whole template.

        What is left out is a whole number of periods, so that the last layer of the short stack is
        of the same kind as the last layer of the model.

        Example:
            >>> Shortening.of(80, period=1).num_traced
            5
            >>> Shortening.of(26, period=6, irregular=6).num_traced
            20
            >>> Shortening.of(4, period=1).num_traced
            4
        """
        head = irregular + _NEIGHBOURS
        smallest = head + period + _TAIL
        if num_layers <= smallest:
            return cls(num_layers, period, head, num_layers)
        return cls(num_layers, period, head, smallest + (num_layers - smallest) % period)

    @property
    def copies(self) -> int:
        """How many periods the short stack lacks."""
        return (self.num_layers - self.num_traced) // self.period

    def weight(self, path: str, layers: str | None) -> int:
        """Return for how many parameters of the whole model one of the short stack stands.

        Args:
            path: dotted path of the parameter.
            layers: dotted path of the list of layers.
        """
        if layers is None or not path.startswith(f"{layers}."):
            return 1
        index = int(path[len(layers) + 1 :].partition(".")[0])
        return self.copies + 1 if self.head <= index < self.head + self.period else 1

    def selected(self, per_layer: Sequence[_Entry]) -> list[_Entry]:
        """Return the entries of the layers that stay, out of one entry for each layer."""
        behind = self.head + self.period
        return [*per_layer[:behind], *per_layer[behind + self.num_layers - self.num_traced :]]


class _Key(NamedTuple):
    """Where in the trace a storage is born: pass over the layers, layer, how many before it."""

    sweep: int
    layer: int
    ordinal: int


class _Run(NamedTuple):
    """Neighbouring events that belong to one layer, or to none."""

    layer: int | None
    sweep: int
    events: tuple[Event, ...]
    starts_steady: bool


def unroll(short: Trace, shortening: Shortening) -> Trace:
    """Return the trace of the whole stack.

    Raises:
        NotPeriodicError: neighbouring periods of the short trace differ.
    """
    if shortening.copies == 0:
        return short
    return _Unroller(short, shortening).trace()


class _Unroller:
    """The state of one unrolling."""

    def __init__(self, short: Trace, shortening: Shortening) -> None:
        self._short = short
        self._period = shortening.period
        self._copies = shortening.copies
        self._first = shortening.head
        self._last = shortening.head + shortening.period
        self._num_traced = shortening.num_traced
        self._runs = _runs(short)
        self._keys, self._at = _keys(short, self._runs)
        self._storages: list[Storage] = []
        self._events: list[Event] = []
        self._live: dict[tuple[int, int], int] = {}
        self._steady_from = 0

    def trace(self) -> Trace:
        for sweep in self._sweeps():
            self._check(sweep)
            self._write_sweep(sweep)
        return Trace(tuple(self._storages), tuple(self._events), self._steady_from)

    def _sweeps(self) -> list[list[_Run]]:
        sweeps: dict[int, list[_Run]] = defaultdict(list)
        for run in self._runs:
            sweeps[run.sweep].append(run)
        return list(sweeps.values())

    def _write_sweep(self, sweep: list[_Run]) -> None:
        template = [run for run in sweep if self._in_template(run.layer)]
        written = False
        ascending = len(sweep) == 1 or (sweep[-1].layer or 0) > (sweep[0].layer or 0)
        for run in sweep:
            if run.layer is None or run.layer < self._first:
                self._write(run, 0)
            elif run.layer >= self._last:
                self._write(run, self._copies)
            elif not written:
                written = True
                order = range(self._copies + 1) if ascending else range(self._copies, -1, -1)
                for copy in order:
                    for part in template:
                        self._write(part, copy)

    def _in_template(self, layer: int | None) -> bool:
        return layer is not None and self._first <= layer < self._last

    def _write(self, run: _Run, copy: int) -> None:
        """Write the events of one layer, `copy` periods further up the stack than traced."""
        if run.starts_steady:
            self._steady_from = len(self._events)
        shift = copy * self._period
        for event in run.events:
            layer = None if event.layer is None else event.layer + shift
            source, source_copy = self._resolve(event.storage, event.layer, shift)
            if event.is_alloc:
                index = len(self._storages)
                self._live[source, source_copy] = index
                storage = self._short.storages[source]
                owner = storage.layer
                if owner is not None and layer is not None and event.layer is not None:
                    owner += layer - event.layer
                self._storages.append(replace(storage, layer=owner))
            else:
                found = self._live.pop((source, source_copy), None)
                if found is None:
                    raise NotPeriodicError("a storage would be freed twice")
                index = found
            self._events.append(Event(index, event.is_alloc, event.phase, layer))

    def _resolve(self, storage: int, position: int | None, shift: int) -> tuple[int, int]:
        """Return the traced storage, and its copy, that an event refers to after the shift."""
        key = self._keys[storage]
        if key is None or position is None:
            return storage, 0
        target = key.layer + shift
        end = self._first + self._period * (self._copies + 1)
        if target < self._first:
            layer, copy = target, 0
        elif target < end:
            copy, rest = divmod(target - self._first, self._period)
            layer = self._first + rest
        else:
            layer, copy = target - self._copies * self._period, self._copies
        if layer == key.layer:
            return storage, copy
        twin = self._at.get(key._replace(layer=layer))
        if twin is None or not _alike(self._short.storages[storage], self._short.storages[twin]):
            raise NotPeriodicError(f"layer {layer} has no counterpart of a storage")
        return twin, copy

    def _check(self, sweep: list[_Run]) -> None:
        """Refuse unless each regular layer does what the layer one period later does."""
        by_layer = {run.layer: run for run in sweep}
        regular = range(self._first - 1, self._num_traced - 1)
        present = [layer for layer in regular if layer in by_layer]
        if not present:
            return
        if len(present) != len(regular):
            raise NotPeriodicError("a pass over the layers leaves some of them out")
        for layer in regular:
            if layer + self._period in regular:
                self._check_pair(by_layer[layer], by_layer[layer + self._period])

    def _check_pair(self, left: _Run, right: _Run) -> None:
        if len(left.events) != len(right.events):
            raise NotPeriodicError(f"layers {left.layer} and {right.layer} do different work")
        for one, two in zip(left.events, right.events, strict=True):
            same = (one.is_alloc, one.phase) == (two.is_alloc, two.phase)
            if not same or not self._same_target(one.storage, two.storage):
                raise NotPeriodicError(f"layers {left.layer} and {right.layer} do different work")

    def _same_target(self, one: int, two: int) -> bool:
        left, right = self._keys[one], self._keys[two]
        if left is None or right is None:
            return False
        if left.layer < self._first - 1 or right.layer == self._num_traced - 1:
            return True
        shifted = left._replace(layer=left.layer + self._period)
        return shifted == right and _alike(self._short.storages[one], self._short.storages[two])


def _alike(one: Storage, two: Storage) -> bool:
    return replace(one, layer=None) == replace(two, layer=None)


def _runs(trace: Trace) -> list[_Run]:
    """Cut the events where the layer changes, and number the passes over the layers."""
    runs: list[_Run] = []
    sweep = direction = 0
    previous: int | None = None
    start = 0
    events = trace.events
    for index in range(1, len(events) + 1):
        at_end = index == len(events)
        steady = index == trace.steady_from
        if not at_end and not steady and events[index].layer == events[start].layer:
            continue
        layer = events[start].layer
        step = 0 if layer is None or previous is None else layer - previous
        continues = abs(step) == 1 and direction in (0, step) and start != trace.steady_from
        if not continues:
            sweep += 1
        direction = step if continues else 0
        previous = layer
        runs.append(
            _Run(layer, sweep, events[start:index], starts_steady=start == trace.steady_from)
        )
        start = index
    return runs


def _keys(trace: Trace, runs: list[_Run]) -> tuple[list[_Key | None], dict[_Key, int]]:
    """Name each storage of a layer by the place of its birth, and find it by that name."""
    keys: list[_Key | None] = [None] * len(trace.storages)
    at: dict[_Key, int] = {}
    for run in runs:
        if run.layer is None:
            continue
        ordinal = 0
        for event in run.events:
            if event.is_alloc:
                key = _Key(run.sweep, run.layer, ordinal)
                keys[event.storage], at[key] = key, event.storage
                ordinal += 1
    return keys, at
