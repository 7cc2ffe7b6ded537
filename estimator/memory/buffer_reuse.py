"""Buffers of a compiled graph that serve again instead of going back to the allocator.

The Python that inductor writes around its kernels frees a buffer only if no later buffer of the
same type and size takes its place; the last one that was let go of is taken first. So of what the
layers of a model make one after the other, most is asked of the allocator once. A buffer is made
anew where keeping the old one meanwhile would raise the highest point of the graph.

Source: torch-inductor, codegen/wrapper.py, AllocateLine.plan, AllocateLine.should_reuse_buffer and
FreeIfNotReusedLine.plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from estimator.dtypes import DType
from estimator.eager.tensor import Event, Section, TensorKind
from estimator.sources import Cite

# What autograd makes for a graph, or a kernel for itself, is no buffer of the graph.
_GIVEN: Final = ("zeros for the logits", "gradient of the loss")


class Planned(NamedTuple):
    """A log as the written code runs it.

    Args:
        log: what is asked of the allocator, and given back.
        names: the number under which a tensor was asked for, if it took the place of another.
    """

    log: tuple[Section, ...]
    names: dict[int, int]


def planned(
    log: Sequence[Section],
    kinds: Sequence[TensorKind],
    sizes: Sequence[int],
    outside: Collection[int],
) -> Planned:
    """Return the log of a step whose forward and backward are one compiled graph each.

    Args:
        sizes: of each kind of tensor [bytes].
        outside: sites that belong to no graph.
    """
    rules = _Rules(kinds, sizes)
    out: list[Section] = []
    names: dict[int, int] = {}
    for _, group in groupby(log, lambda each: each.phase):
        graph = _Graph(rules, names)
        for section in group:
            graph.add(section, in_graph=section.site not in outside)
        out += graph.planned()
    return Planned(tuple(out), names)


class _Rules:
    """What the kinds of tensor say about their buffers."""

    def __init__(self, kinds: Sequence[TensorKind], sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.keys = [(kind.dtype, size) for kind, size in zip(kinds, sizes, strict=True)]
        self.counts = [_is_buffer(kind) for kind in kinds]
        self.fits = [not _makes_itself(kind) for kind in kinds]


class _Line(NamedTuple):
    """A buffer that is made or let go of, in one of the moments between which levels are known.

    Args:
        kind: what it is, None for a buffer of another graph, which serves nobody here.
        place: its section and its number there.
    """

    serial: int
    kind: int | None
    made: bool
    moment: int
    place: tuple[int, int]


class _Graph:
    """The lines of one graph.

    A kernel makes its results before what it alone has read is let go of. So a moment begins
    where something is made behind something that was let go of.
    """

    def __init__(self, rules: _Rules, names: dict[int, int]) -> None:
        self.rules = rules
        self.names = names
        self.lines: list[_Line] = []
        self.sections: list[tuple[Section, list[Event | None]]] = []
        self.levels = [0]
        self._born: dict[int, int] = {}
        self._now = 0
        self._fell = False

    def add(self, section: Section, *, in_graph: bool) -> None:
        """Add what happens in a section; outside the graph nothing is planned."""
        self.sections.append((section, list(section.events)))
        if not in_graph:
            return
        for number, (serial, kind) in enumerate(section.events):
            if kind is None or self.rules.counts[kind]:
                self._line(serial, kind, (len(self.sections) - 1, number))

    def _line(self, serial: int, kind: int | None, place: tuple[int, int]) -> None:
        made = kind is not None
        if kind is not None:
            self._born[serial] = kind
            self._now += self.rules.sizes[kind]
        elif serial in self._born:
            kind = self._born.pop(serial)
            self._now -= self.rules.sizes[kind]
        if made and self._fell:
            self.levels.append(self._now)
        self._fell = not made
        self.levels[-1] = max(self.levels[-1], self._now)
        self.lines.append(_Line(serial, kind, made, len(self.levels) - 1, place))

    def planned(self) -> list[Section]:
        """Let buffers serve again, and return what is left."""
        highest = max(self.levels)
        pool: dict[tuple[DType, int], list[_Line]] = {}
        for line in self.lines:
            if line.kind is None:
                continue
            free = pool.setdefault(self.rules.keys[line.kind], [])
            if not line.made:
                free.append(line)
            elif free and self.rules.fits[line.kind] and self._keeps(free[-1], line, highest):
                before = free.pop()
                self._drop(before)
                self._drop(line)
                self.names[line.serial] = self.names.get(before.serial, before.serial)
        return [
            section._replace(events=tuple(self._renamed(events)))
            for section, events in self.sections
        ]

    def _keeps(self, before: _Line, line: _Line, highest: int) -> bool:
        """Keep a buffer until it serves again, if that raises nothing."""
        between = range(before.moment + 1, line.moment)
        size = self.rules.sizes[line.kind or 0]
        if between and max(self.levels[between.start : between.stop]) + size > highest:
            return False
        for moment in between:
            self.levels[moment] += size
        return True

    def _drop(self, line: _Line) -> None:
        section, number = line.place
        self.sections[section][1][number] = None

    def _renamed(self, events: Sequence[Event | None]) -> Iterator[Event]:
        for each in events:
            if each is not None:
                yield self.names.get(each[0], each[0]), each[1]


def _is_buffer(kind: TensorKind) -> bool:
    return kind.component not in ("buffers", "workspace") and not kind.name.endswith(_GIVEN)


def _makes_itself(kind: TensorKind) -> bool:
    """Whether a kernel that inductor only calls makes this result: it fits in nowhere."""
    return isinstance(kind.source, Cite) and "scaled_dot_product" in kind.source.where
