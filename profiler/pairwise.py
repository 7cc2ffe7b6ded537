"""Rows that try settings together: every pair of values in few rows, the newest pairs first.

A fault that shows when two settings meet is found once they have been in one row. The rows are
made greedily, so that the first part of them, wherever a budget ends it, covers many pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Final, NamedTuple

Value = tuple[str, str]
"""The name of a lever and the name of one of its values."""

_STARTS: Final = 12


class Row(NamedTuple):
    """One value for each lever.

    Args:
        values: the name of the value, by lever.
        new_pairs: how many pairs of values no earlier row has.
    """

    values: Mapping[str, str]
    new_pairs: int


class Pairs:
    """The pairs that rows should cover, and those that cannot be.

    Args:
        levers: the names of the values of each lever, by lever.
        impossible: pairs that no row may have.
    """

    def __init__(
        self, levers: Mapping[str, Sequence[str]], impossible: frozenset[frozenset[Value]]
    ) -> None:
        self._levers = tuple(levers)
        self._values = [(lever, name) for lever, names in levers.items() for name in names]
        self._index = {value: number for number, value in enumerate(self._values)}
        self._of = {
            lever: [self._index[lever, name] for name in names] for lever, names in levers.items()
        }
        self._masks = {
            lever: sum(1 << each for each in numbers) for lever, numbers in self._of.items()
        }
        # One bit for each value: those that it may meet, and those that it has not met yet.
        self._allowed = [0] * len(self._values)
        for a, b in combinations(range(len(self._values)), 2):
            one, other = self._values[a], self._values[b]
            if one[0] != other[0] and frozenset((one, other)) not in impossible:
                self._allowed[a] |= 1 << b
                self._allowed[b] |= 1 << a
        self._left = list(self._allowed)

    @property
    def left(self) -> int:
        """How many pairs are not covered yet."""
        return sum(each.bit_count() for each in self._left) // 2

    def cover(self, values: Mapping[str, str]) -> int:
        """Take a row's pairs as covered, and return how many of them were not before."""
        chosen = self._numbers(values)
        new, mask = self._new(chosen), sum(1 << each for each in chosen)
        for each in chosen:
            self._left[each] &= ~mask
        return new

    def new(self, values: Mapping[str, str]) -> int:
        """Return how many pairs of a row are not covered yet."""
        return self._new(self._numbers(values))

    def _numbers(self, values: Mapping[str, str]) -> list[int]:
        return [self._index[each] for each in values.items() if each in self._index]

    def rows(self, accepts: Callable[[Mapping[str, str]], bool]) -> Iterator[Row]:
        """Yield rows until every pair is covered that a row can have.

        Args:
            accepts: whether a row is possible as a whole; asked before it is taken.
        """
        while any(self._left):
            grown = [self._grown(start) for start in self._starts()]
            ranked = sorted(filter(None, grown), key=lambda row: -self._new(row))
            found = next((row for row in ranked if accepts(self._named(row))), None)
            if found is None:
                found = self._last_resort(accepts)
            if found is None:
                return
            values = self._named(found)
            yield Row(values, self.cover(values))

    def _named(self, row: list[int]) -> dict[str, str]:
        values = dict(self._values[each] for each in row)
        return {lever: values[lever] for lever in self._levers}

    def _starts(self) -> list[tuple[int, int]]:
        """Return pairs to begin a row with: those whose values have met the fewest others."""
        open_pairs = sorted(
            (-(self._left[a].bit_count() + self._left[b].bit_count()), a, b)
            for a, b in self._open()
        )
        return [(a, b) for _, a, b in open_pairs[:_STARTS]]

    def _open(self) -> Iterator[tuple[int, int]]:
        for a, left in enumerate(self._left):
            for b in _bits(left >> (a + 1), a + 1):
                yield a, b

    def _last_resort(self, accepts: Callable[[Mapping[str, str]], bool]) -> list[int] | None:
        """Return a row for the first open pair that has one; forget those that have none."""
        for a, b in list(self._open()):
            for row in self._variants((a, b)):
                if accepts(self._named(row)):
                    return row
            self._left[a] &= ~(1 << b)
            self._left[b] &= ~(1 << a)
        return None

    def _variants(self, start: tuple[int, ...]) -> Iterator[list[int]]:
        """Yield rows with a pair: the best, those without one of its values, and plain ones."""
        first = self._grown(start)
        if not first:
            return
        yield first
        yield from filter(None, (self._grown(start, without=1 << each) for each in first[2:]))
        free = self._allowed[start[0]] & self._allowed[start[1]]
        yield from filter(None, (self._grown((*start, each), plain=True) for each in _bits(free)))

    def _grown(self, start: tuple[int, ...], without: int = 0, plain: bool = False) -> list[int]:
        """Complete a row, the lever with the most to gain first; empty where nothing fits.

        Args:
            without: values that it shall not have.
            plain: take the first value of each lever that fits, whatever is to be gained.
        """
        chosen, mask, free = list(start), 0, ~without
        for value in start:
            mask |= 1 << value
            free &= self._allowed[value]
        levers = [each for each in self._levers if each not in map(self._lever, start)]
        while levers:
            best = max(
                (
                    (
                        not plain and (self._left[v] & mask).bit_count(),
                        not plain and (self._left[v] & free).bit_count(),
                        -v,
                    )
                    for lever in levers
                    for v in self._of[lever]
                    if free >> v & 1 and self._leaves_room(v, free, levers)
                ),
                default=None,
            )
            if best is None:
                return []
            value = -best[2]
            chosen.append(value)
            mask |= 1 << value
            free &= self._allowed[value]
            levers.remove(self._lever(value))
        return chosen

    def _leaves_room(self, value: int, free: int, levers: list[str]) -> bool:
        """Whether every other open lever keeps a value that may still be chosen."""
        left, own = free & self._allowed[value], self._lever(value)
        return all(left & self._masks[lever] for lever in levers if lever != own)

    def _lever(self, value: int) -> str:
        return self._values[value][0]

    def _new(self, row: list[int]) -> int:
        mask = sum(1 << each for each in row)
        return sum((self._left[each] & mask).bit_count() for each in row) // 2


def ordered(
    levers: Mapping[str, Sequence[str]],
    first: Iterable[Mapping[str, str]],
    rows: Iterable[Mapping[str, str]],
) -> Iterator[Row]:
    """Yield rows so that each next one brings the most pairs that those before it do not have.

    Args:
        first: rows that come before all of these.
    """
    pairs, waiting = Pairs(levers, frozenset()), list(rows)
    for values in first:
        pairs.cover(values)
    while waiting:
        # The first of equal ones, so that the order is always the same.
        best = max(range(len(waiting)), key=lambda number: (pairs.new(waiting[number]), -number))
        values = waiting.pop(best)
        yield Row(values, pairs.cover(values))


def _bits(mask: int, offset: int = 0) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1 + offset
        mask ^= low
