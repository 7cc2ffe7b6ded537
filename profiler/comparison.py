"""Two engines' answers to one request, subtracted row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from estimator.components import COMPONENTS
from estimator.memory.loading import LOADING
from estimator.result import Result, ResultRow


@dataclass(frozen=True, slots=True)
class Difference:
    """One component at the peak, or one phase of the step: the bytes of both engines."""

    name: str
    left: int
    right: int

    @property
    def bytes(self) -> int:
        """What the left engine has more than the right one [bytes]."""
        return self.left - self.right


@dataclass(frozen=True, slots=True)
class Comparison:
    """The subtraction of two results.

    Args:
        engines: the names of the left and the right engine.
        moments: the peak moment of each.
        phases: allocated bytes at the highest point of each phase.
        components: bytes of each component at the peak.
        only_left, only_right: rows at the peak that the other engine has no row of equal size for.
    """

    engines: tuple[str, str]
    moments: tuple[str, str]
    peak: Difference
    phases: tuple[Difference, ...]
    components: tuple[Difference, ...]
    only_left: tuple[ResultRow, ...]
    only_right: tuple[ResultRow, ...]


def subtract(left: Result, right: Result) -> Comparison:
    """Return what differs between two answers to one request."""
    only_left, only_right = _unmatched(left, right)
    return Comparison(
        engines=(left.engine, right.engine),
        moments=(left.peak.moment, right.peak.moment),
        peak=Difference(
            "peak", left.peak.allocated_bytes.expected, right.peak.allocated_bytes.expected
        ),
        phases=_paired(by_phase(left), by_phase(right)),
        components=_paired(_by_component(left), _by_component(right)),
        only_left=only_left,
        only_right=only_right,
    )


def by_phase(result: Result) -> dict[str, int]:
    """Return the highest moment of each phase; the analytic engine's moments name sites as well.

    The dry run begins with the model on the device, so loading is left out.
    """
    highest: dict[str, int] = {}
    for moment in result.timeline:
        if moment.moment == LOADING:
            continue
        phase = moment.moment.split(":", 1)[0].removeprefix("end of ")
        highest[phase] = max(highest.get(phase, 0), moment.bytes)
    return highest


def _by_component(result: Result) -> dict[str, int]:
    found = {part.component: part.bytes for part in result.breakdown}
    return {name: found[name] for name in COMPONENTS if name in found}


def _paired(left: dict[str, int], right: dict[str, int]) -> tuple[Difference, ...]:
    names = dict.fromkeys((*left, *right))
    return tuple(Difference(name, left.get(name, 0), right.get(name, 0)) for name in names)


def _unmatched(left: Result, right: Result) -> tuple[tuple[ResultRow, ...], tuple[ResultRow, ...]]:
    """Return the rows of each side that the other side has no row of the same size for.

    One engine may write as one row what the other writes as several, so rows of a component are
    first split into tensors of one size.
    """
    sides = (_tensors(left), _tensors(right))
    return _rest(left, sides[0], sides[1]), _rest(right, sides[1], sides[0])


def _tensors(result: Result) -> Counter[tuple[str, int]]:
    """Count the tensors of each size in each component."""
    found: Counter[tuple[str, int]] = Counter()
    for part in result.breakdown:
        for row in part.rows:
            if row.count:
                found[part.component, row.bytes // row.count] += row.count
    return found


def _rest(
    result: Result, own: Counter[tuple[str, int]], other: Counter[tuple[str, int]]
) -> tuple[ResultRow, ...]:
    excess = own - other
    rows = [
        row
        for part in result.breakdown
        for row in part.rows
        if row.count and excess[part.component, row.bytes // row.count]
    ]
    return tuple(sorted(rows, key=lambda row: -row.bytes))
