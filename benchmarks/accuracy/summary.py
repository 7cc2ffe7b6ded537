"""Errors by source, by stratum and by engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.accuracy.meters import METER_ORDER, Meter
from benchmarks.accuracy.points import Point
from benchmarks.accuracy.statistics import COLUMNS, RULE, errors
from benchmarks.accuracy.traced import Traced, traced_comparisons


def by_source(points: Sequence[Point], tolerance: float) -> Iterator[str]:
    """Yield the table of every source and meter."""
    yield "## Errors by source\n"
    yield (
        "Counted are peaks of completeness 2 or 3 that are not suspect, one meter at a time, so\n"
        "that a large source does not speak for the small ones. Bias is the mean signed error;\n"
        "percentiles of the size of the error are by nearest rank; inside are readings between\n"
        "the low and the high end of the answer at 95 % confidence.\n"
    )
    yield f"| source | meter | {COLUMNS} | beyond 5 % | inside |"
    yield f"|---|---|{RULE}|---:|---:|"
    for (group, meter), each in grouped(points).items():
        beyond = sum(abs(point.error) > tolerance for point in each)
        inside = sum(point.inside for point in each)
        cells = errors([point.error for point in each]).cells
        yield f"| {group} | {meter} | {cells} | {beyond} | {inside} |"
    yield ""


def grouped(points: Iterable[Point]) -> dict[tuple[str, Meter], list[Point]]:
    """Return the points of every source and meter, in the order in which they come."""
    found: dict[tuple[str, Meter], list[Point]] = {}
    for each in points:
        found.setdefault((each.group, each.meter), []).append(each)
    return found


def by_meter(points: Sequence[Point]) -> Iterator[str]:
    """Yield the table of every meter, all sources together."""
    yield "## Errors by meter\n"
    yield "All sources together; those with many rows weigh most here.\n"
    yield f"| meter | sources | {COLUMNS} |"
    yield f"|---|---:|{RULE}|"
    for meter in METER_ORDER:
        each = [point for point in points if point.meter == meter]
        if each:
            sources = len({point.group for point in each})
            yield f"| {meter} | {sources} | {errors([point.error for point in each]).cells} |"
    yield ""


def by_stratum(points: Sequence[Point]) -> Iterator[str]:
    """Yield the table of what the runs have in common, one meter at a time."""
    yield "## Errors by stratum\n"
    yield f"| stratum | meter | sources | {COLUMNS} |"
    yield f"|---|---|---:|{RULE}|"
    found: dict[tuple[str, str, Meter], list[Point]] = {}
    for point in points:
        for kind, value in point.strata:
            found.setdefault((kind, value, point.meter), []).append(point)
    for (kind, value, meter), each in sorted(found.items(), key=lambda one: _order(*one[0])):
        sources = len({point.group for point in each})
        cells = errors([point.error for point in each]).cells
        yield f"| {kind}: {value} | {meter} | {sources} | {cells} |"
    yield ""


def _order(kind: str, value: str, meter: Meter) -> tuple[str, str, int]:
    return kind, value, METER_ORDER.index(meter)


def by_engine(points: Sequence[Point], traced: Sequence[Traced]) -> Iterator[str]:
    """Yield the table of both engines on the rows that both can answer."""
    yield "## Errors by engine\n"
    yield (
        "The dry run runs the libraries that are installed, so it can stand beside a published\n"
        "run only where that run's software is the installed one, or where the answer does not\n"
        "depend on it: where the analytic engine gives the same allocated bytes for both.\n"
        "`python -m benchmarks.accuracy.traced` makes these dry runs again.\n"
    )
    pairs = traced_comparisons(points, traced)
    if not pairs:
        yield "No published row is one of these.\n"
        return
    yield f"| engine | meter | {COLUMNS} |"
    yield f"|---|---|{RULE}|"
    for meter in METER_ORDER:
        rows = [pair for pair in pairs if pair.point.meter == meter]
        if rows:
            analytic = errors([pair.point.error for pair in rows]).cells
            dry_run = errors([pair.error for pair in rows]).cells
            yield f"| analytic | {meter} | {analytic} |"
            yield f"| dry run | {meter} | {dry_run} |"
    yield ""
