"""The log of a whole model from that of a few of its layers, exactly.

Inner layers repeat with a period, and what one of them allocates and frees, the layer a period
later does too. So a few layers are run, and the events of one period are written out for all:

    layers run    0 | 1 ... p | p+1 ... 2p | 2p+1 ... | last
                                template, between the neighbours p and 2p+1 that it refers to

A first period stays in front, because the first layer of each kind is where backward lets go of
what all of them share. Copy c of a template's tensor has the number `number + c * STRIDE`. The
neighbours are named as the copies that stand in their place: layer p as the template's last layer
one copy before the first, layer 2p+1 as its first layer one copy behind the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from msgspec import Struct

from estimator.eager.tensor import Event, Section

STRIDE: Final = 1 << 32


class NotPeriodicError(Exception):
    """The layers that were run do not repeat as the pattern of their kinds does."""


class Shortening(Struct, frozen=True):
    """A stack of layers with whole periods left out.

    Args:
        pattern: the kinds of the layers that stay.
        period: inner layers after which the kinds repeat.
        copies: periods that were left out behind the template.
    """

    pattern: tuple[int, ...]
    period: int
    copies: int


def shorten(pattern: tuple[int, ...]) -> Shortening:
    """Leave out as many periods as the template and its neighbours allow.

    Example:
        >>> shorten((0,) * 32)
        Shortening(pattern=(0, 0, 0, 0, 0), period=1, copies=27)
        >>> shorten((0, 1, 0, 1, 0)).copies
        0
    """
    inner = pattern[1:-1]
    period = next((each for each in range(1, len(inner)) if inner[each:] == inner[:-each]), 0)
    if not period:
        return Shortening(pattern, 0, 0)
    copies = max(0, (len(inner) - 2 * period - 1) // period)
    kept = len(inner) - copies * period
    return Shortening((pattern[0], *inner[:kept], pattern[-1]), period, copies)


def unroll(
    log: Sequence[Section], sizes: Sequence[tuple[int, int]], cut: Shortening
) -> tuple[Section, ...]:
    """Return the log of the whole stack; its sections keep the sites of the layers that were run.

    Args:
        log: of the layers that stay.
        sizes: the size of each kind of tensor.

    Raises:
        NotPeriodicError: neighbouring periods differ, or refer to more than their neighbours.
    """
    return _Unroller(log, sizes, cut).unrolled()


class _Birth(NamedTuple):
    """Where a tensor was allocated; None for a place that is no layer."""

    phase: str
    layer: int | None


class _Unroller:
    def __init__(
        self, log: Sequence[Section], sizes: Sequence[tuple[int, int]], cut: Shortening
    ) -> None:
        self.log = log
        self.sizes = sizes
        self.copies = cut.copies
        self.num_layers = len(cut.pattern)
        self.first, self.behind = cut.period + 1, 2 * cut.period + 1
        self.template = range(self.first, self.behind)
        self.before = cut.period
        self.layers: dict[tuple[str, int], Section] = {}
        self.births: dict[int, _Birth] = {}
        for section in log:
            self._index(section)
        self.names: dict[int, int] = {}
        for phase in ("forward", "backward"):
            self._rename(phase, self.before, self.behind - 1, -STRIDE)
            self._rename(phase, self.behind, self.first, (self.copies + 1) * STRIDE)

    def unrolled(self) -> tuple[Section, ...]:
        self._check("forward", self.first, self.behind, self.copies + 1)
        self._check("backward", self.behind - 1, self.before, -1)
        out: list[Section] = []
        for (inside, phase), group in groupby(self.log, lambda each: self._block(each)):
            if not inside:
                out += [each._replace(events=tuple(self._once(each))) for each in group]
                continue
            block = tuple(group)
            copies = range(self.copies + 1)
            for copy in copies if phase == "forward" else reversed(copies):
                out += [each._replace(events=tuple(self._copy(each, copy))) for each in block]
        return tuple(out)

    def _layer(self, section: Section) -> int | None:
        """Return the layer that a section belongs to; site 0 is the embeddings."""
        return section.site - 1 if 1 <= section.site <= self.num_layers else None

    def _block(self, section: Section) -> tuple[bool, str]:
        return self._layer(section) in self.template, section.phase

    def _index(self, section: Section) -> None:
        layer = self._layer(section)
        if layer is not None:
            if (section.phase, layer) in self.layers:
                raise NotPeriodicError(f"layer {layer} is entered twice in {section.phase}")
            self.layers[section.phase, layer] = section
        birth = _Birth(section.phase, layer)
        self.births.update((number, birth) for number, kind in section.events if kind is not None)

    def _born(self, phase: str, layer: int) -> list[int]:
        return [number for number, kind in self._section(phase, layer).events if kind is not None]

    def _section(self, phase: str, layer: int) -> Section:
        try:
            return self.layers[phase, layer]
        except KeyError:
            raise NotPeriodicError(f"layer {layer} allocates nothing in {phase}") from None

    def _rename(self, phase: str, neighbour: int, twin: int, offset: int) -> None:
        """Name the tensors of a neighbour after those of the layer that it is a copy of."""
        numbers, twins = self._born(phase, neighbour), self._born(phase, twin)
        if len(numbers) != len(twins):
            raise NotPeriodicError(f"layers {neighbour} and {twin} differ in {phase}")
        self.names.update(
            (number, other + offset) for number, other in zip(numbers, twins, strict=True)
        )

    def _check(self, phase: str, layer: int, neighbour: int, copy: int) -> None:
        """Refuse unless a neighbour does what the copy of a template's layer would do.

        What they free of earlier layers is left out: the very first layer may keep other things.
        """
        expected = self._copy(self._own(phase, layer), copy)
        found = self._once(self._own(phase, neighbour))
        if self._sized(expected) != self._sized(found):
            raise NotPeriodicError(f"layers {layer} and {neighbour} differ in {phase}")

    def _own(self, phase: str, layer: int) -> Section:
        section = self._section(phase, layer)
        late = [event for event in section.events if self._reach(event) >= layer]
        return section._replace(events=tuple(late))

    def _reach(self, event: Event) -> int:
        """Return the layer whose tensor an event is about, -1 where it belongs to none."""
        layer = self.births[event[0]].layer
        return -1 if layer is None else layer

    def _sized(self, events: Iterator[Event]) -> list[tuple[int, tuple[int, int] | None]]:
        return [(number, None if kind is None else self.sizes[kind]) for number, kind in events]

    def _copy(self, section: Section, copy: int) -> Iterator[Event]:
        """Yield the events of one of the template's layers in one of its copies."""
        offset = copy * STRIDE
        for number, kind in section.events:
            layer = self.births[number].layer
            if layer in self.template:
                yield number + offset, kind
            elif layer == self.before:
                yield self.names[number] + offset, kind
            elif layer == self.behind:
                yield self.names[number] + offset - self.copies * STRIDE, kind
            else:
                raise NotPeriodicError(f"a layer frees what was allocated in layer {layer}")

    def _once(self, section: Section) -> Iterator[Event]:
        """Yield the events of a section outside the template.

        Layers before it reach its first copy and layers behind it the last; what is no layer, such
        as the end of a loop that held a cache, frees the tensors of all copies.
        """
        here = self._layer(section)
        for number, kind in section.events:
            layer = self.births[number].layer
            if layer not in self.template:
                self._refuse_far(here, layer)
                yield self.names.get(number, number), kind
            elif here is None:
                yield from ((number + copy * STRIDE, kind) for copy in range(self.copies + 1))
            else:
                yield number + (self.copies * STRIDE if here >= self.behind else 0), kind

    def _refuse_far(self, here: int | None, layer: int | None) -> None:
        if here is None or layer is None:
            return
        if (here < self.first) != (layer < self.first):
            raise NotPeriodicError(f"layer {here} frees what was allocated in layer {layer}")
