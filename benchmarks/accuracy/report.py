"""From measurement records to calibrated ranges to the page `docs/accuracy.md`, in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.accuracy import charts, ranges, records, rows, summary, traced, verdicts
from benchmarks.accuracy.comparison import Answers, Comparison, answers, comparisons
from benchmarks.accuracy.points import Point, published, recorded
from benchmarks.accuracy.published import ROOT, measured, out_of_memory
from benchmarks.peers import report as peers
from estimator import calibration, calibration_file
from estimator.record import Run, read, runs
from profiler.calibrate import calibrations, residuals
from profiler.calibrate_cli import record_files, write

PAGE: Final = ROOT / "docs" / "accuracy.md"
PICTURES: Final = ROOT / "docs" / "accuracy"
CALIBRATION: Final = ROOT / "data" / calibration_file.FOLDER

INTRODUCTION: Final = """\
# Accuracy

Written by `make accuracy`, which goes the whole way without a GPU and without a network: published
rows become measurement records (`data/published/records.jsonl`), these and our own
(`data/measurements/`) become calibration files (`data/calibration/`), and this page compares all of
them with our answers. The same records give the same bytes; a test fails when the page is out of
date. The published measurements and what is known about them are in
[data/published](../data/published/README.md).

Every published row that the request document can express is estimated with the software that its
source used, and each meter is compared with the same quantity of the answer:
`max_memory_allocated` with allocated bytes, `max_memory_reserved` with reserved bytes, nvidia-smi
with device memory in use. How a row becomes a request is in `benchmarks/accuracy/recipes.py`, one
rule for a source. No constant of the estimator is fitted to a row; the ranges are.
"""
NONE_OF_OURS: Final = (
    "None of these measurements is ours: no run of `estimate campaign` on a GPU has been recorded\n"
    "yet. What the allocator, the context and the kernels of a newer stack do on a newer card is\n"
    "therefore not seen here.\n"
)


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the page is written from."""

    rows: Answers
    compared: tuple[Comparison, ...]
    failures: Answers
    ours: tuple[Run, ...]
    points: tuple[Point, ...]
    judged: tuple[verdicts.Judged, ...]
    covered: tuple[ranges.Coverage, ...]


def calibrate() -> None:
    """Turn the published rows into records, and all records into calibration files."""
    records.write(answers(measured()), answers(out_of_memory()))
    made, _ = calibrations(record_files(), root=ROOT)
    for each in made:
        write(each, CALIBRATION)
    calibration.forget()


def findings() -> Findings:
    """Answer every row and every record with the calibrations as they are."""
    found, failures = answers(measured()), answers(out_of_memory())
    ours = tuple(
        run for path in record_files() for run in runs(read(path)) if run.origin == "measured"
    )
    compared = comparisons(found.answered)
    readings = published(compared)
    judged = verdicts.published(found, failures)
    return Findings(
        rows=found,
        compared=compared,
        failures=failures,
        ours=ours,
        points=(*readings, *recorded(ours)),
        judged=(*judged, *verdicts.too_small(readings), *verdicts.swept(ours)),
        covered=ranges.coverage(residuals(runs(read(records.FILE)))),
    )


def render(found: Findings) -> str:
    """Return the whole page."""
    sections = (
        INTRODUCTION,
        *_ours(found.ours),
        *summary.by_source(found.points, rows.TOLERANCE),
        "![Signed errors by source](accuracy/errors.svg)\n",
        "![Estimated against measured](accuracy/scatter.svg)\n",
        *summary.by_meter(found.points),
        *summary.by_engine(found.points, traced.read()),
        *summary.by_stratum(found.points),
        *verdicts.table(found.judged),
        *rows.failed(found.failures),
        *ranges.sections(found.points, calibration_file.installed(), found.covered),
        "![Coverage on held-out sources](accuracy/coverage.svg)\n",
        *peers.sections(found.compared),
        *rows.measurements(found.compared),
        *rows.inexpressible(found.rows),
    )
    return "\n".join(sections).rstrip() + "\n"


def _ours(runs: tuple[Run, ...]) -> Iterator[str]:
    if not runs:
        yield NONE_OF_OURS
        return
    cards = sorted({run.environment.gpu or "unknown" for run in runs})
    yield f"{len(runs)} of the runs are ours, on {', '.join(cards)}.\n"


def pages(found: Findings) -> Iterator[tuple[Path, str]]:
    """Yield the page and its pictures, each with the text that it should have."""
    yield PAGE, render(found)
    yield PICTURES / "errors.svg", charts.error_chart(found.points)
    yield PICTURES / "scatter.svg", charts.scatter_chart(found.points)
    yield PICTURES / "coverage.svg", charts.coverage_chart(found.covered)
