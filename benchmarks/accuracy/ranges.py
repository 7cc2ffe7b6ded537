"""Whether the ranges hold: on what they were made from, and on sources that were left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.accuracy.meters import METER_ORDER
from benchmarks.accuracy.points import Point
from benchmarks.accuracy.statistics import upper_bound
from estimator.calibration_file import Calibration, HeldOut
from profiler.calibrate import Residual, held_out

LEVELS: Final = (0.5, 0.8, 0.9, 0.95, 0.975, 0.99)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many held-out rows lie inside ranges of one confidence."""

    confidence: float
    rows: int
    inside: int

    @property
    def share(self) -> float:
        """The share of rows inside."""
        return self.inside / self.rows


def coverage(residuals: Sequence[Residual]) -> tuple[Coverage, ...]:
    """Return, for each confidence, how the ranges hold on groups that were left out."""
    found = []
    for level in LEVELS:
        each = held_out(residuals, level)
        rows, inside = sum(one.rows for one in each), sum(one.inside for one in each)
        found.append(Coverage(level, rows, inside))
    return tuple(found)


def sections(
    points: Sequence[Point], calibrations: Sequence[Calibration], covered: Sequence[Coverage]
) -> Iterator[str]:
    """Yield what the ranges rest on, how wide they are and how often they hold."""
    yield "## Ranges\n"
    yield (
        "A range at a confidence comes from the residuals of measurements; how is told in\n"
        "[decision 7](decisions/0007-ranges-from-residuals.md). The widening for what no run had\n"
        "is left out of the tables of held-out sources, so that it cannot make them look better.\n"
    )
    for each in calibrations:
        yield from _calibration(each)
    yield "### Width, and what they hold of the runs that they were made from\n"
    yield "Width is high less low over expected, at 95 % confidence, widening included.\n"
    yield "| meter | readings | inside | median width | widest |"
    yield "|---|---:|---:|---:|---:|"
    for meter in METER_ORDER:
        rows = [point for point in points if point.meter == meter]
        if rows:
            inside = sum(point.inside for point in rows)
            widths = [point.width for point in rows]
            yield (
                f"| {meter} | {len(rows)} | {inside} ({inside / len(rows):.1%}) | "
                f"{median(widths):.1%} | {max(widths):.1%} |"
            )
    yield ""
    yield from _held_out(covered)


def _calibration(each: Calibration) -> Iterator[str]:
    yield f"### {each.name}\n"
    files = ", ".join(
        f"`{one.file}` ({one.records} records, sha256 {one.sha256[:12]})" for one in each.made_from
    )
    yield f"Made from {files}.\n"
    yield "| quantity | method | readings | groups | 50 % | 80 % | 95 % | 99 % | supported |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for one in each.strata:
        spreads = " | ".join(f"{one.spread(level):.2%}" for level in (0.5, 0.8, 0.95, 0.99))
        yield (
            f"| {one.quantity} | {one.kind or 'all'} | {one.rows} | {len(one.groups)} | "
            f"{spreads} | {one.supported:.1%} |"
        )
    yield ""
    yield (
        "The columns are spreads: a reading over its expected value lies between 1 / (1 + spread)\n"
        "and 1 + spread. Beyond the supported confidence the tail is extrapolated.\n"
    )
    yield "| held out, one group at a time | confidence | readings | inside |"
    yield "|---|---:|---:|---:|"
    for held in each.held_out:
        yield _held_row(held)
    yield ""


def _held_row(held: HeldOut) -> str:
    share = held.inside / held.rows
    return (
        f"| {held.quantity} | {held.confidence:.0%} | {held.rows} | {held.inside} ({share:.1%}) |"
    )


def _held_out(covered: Sequence[Coverage]) -> Iterator[str]:
    yield "### Cross-validation by source\n"
    yield (
        "Each source in turn is left out, ranges are made from the others, and its readings are\n"
        "looked up in them. The bound is the largest share of misses that so few readings leave\n"
        "plausible (95 %, one-sided, Clopper and Pearson), as if they were independent, which\n"
        "readings of one source are not.\n"
    )
    yield "| confidence | readings | inside | misses | share of misses below |"
    yield "|---:|---:|---:|---:|---:|"
    for each in covered:
        missed = each.rows - each.inside
        bound = upper_bound(missed, each.rows)
        inside = f"{each.inside} ({each.share:.1%})"
        yield f"| {each.confidence:.1%} | {each.rows} | {inside} | {missed} | {bound:.1%} |"
    yield ""
