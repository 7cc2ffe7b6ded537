"""Verdicts beside what happened: runs that failed, runs that ran, and sweeps of memory limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from benchmarks.accuracy.comparison import Answers
from benchmarks.accuracy.points import Point
from benchmarks.accuracy.statistics import upper_bound
from estimator.catalog import Access
from estimator.pipeline import device_of, engine_for
from estimator.record import Run
from estimator.request import EstimateRequest, parse_request
from estimator.result import Verdict
from estimator.service import model_config, requested_gpu


@dataclass(frozen=True, slots=True)
class Judged:
    """What was said of a run, and whether it ran."""

    source: str
    verdict: Verdict
    ran: bool


def published(rows: Answers, failures: Answers) -> tuple[Judged, ...]:
    """Return the verdicts on published runs whose card is known."""
    return tuple(
        Judged("published", run.result.verdict, ran)
        for answers, ran in ((rows, True), (failures, False))
        for run in answers.answered
        if run.result.verdict != "unknown"
    )


TOO_SMALL: Final = "published, on a card a byte too small for its tensors"


def too_small(points: Iterable[Point]) -> tuple[Judged, ...]:
    """Return the verdicts on runs whose tensors were measured, on a card that cannot hold them.

    What was allocated and the least CUDA context are needed at any rate; the card has one byte
    less. The ranges are made from these very readings, so this shows that the verdict uses them,
    not that they hold for others.
    """
    return tuple(
        Judged(TOO_SMALL, _verdict(point.request, round(point.measured) - 1, least=True), ran=False)
        for point in points
        if point.meter == "allocated"
    )


def swept(runs: Iterable[Run]) -> tuple[Judged, ...]:
    """Return the verdicts on runs whose memory was limited.

    The limit is on what the allocator holds, so the card that the run is judged by has the CUDA
    context on top of it.
    """
    return tuple(
        Judged(
            f"{run.group}, limited",
            _verdict(parse_request(dict(run.request)), run.limit_bytes, least=False),
            run.outcome == "ok",
        )
        for run in runs
        if run.limit_bytes is not None and run.outcome != "error"
    )


def _verdict(request: EstimateRequest, limit: int, *, least: bool) -> Verdict:
    """Return the verdict on a card whose allocator can hold `limit` bytes beside the context."""
    gpu = requested_gpu(request)
    context = device_of(gpu, request).constants.context
    memory = limit + (context.low if least else context.expected)
    limited = replace(request, hardware=replace(request.hardware, memory_bytes=memory))
    model = model_config(limited, Access.CATALOGUE)
    engine = engine_for(limited, model.config, model.id)
    return engine.verdict(limited.micro_batch_size, limited.seq_len, device_of(gpu, limited))


def table(judged: Sequence[Judged]) -> Iterator[str]:
    """Yield how often a verdict was wrong, and how often it may be."""
    yield "## Verdicts\n"
    yield (
        "At 95 % confidence. A false fit is a run that failed though it was said to fit; a false\n"
        "refusal is a run that ran though it was said not to. Bounds are those of Clopper and\n"
        "Pearson, one-sided, 95 %: with so few cases a share of 0 proves little.\n"
    )
    yield "| source | runs | happened | fits | tight | does not fit | wrong | share below |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for source in dict.fromkeys(each.source for each in judged):
        for ran in (False, True):
            rows = [each for each in judged if each.source == source and each.ran is ran]
            if rows:
                yield _row(source, ran, rows)
    yield ""


def _row(source: str, ran: bool, rows: Sequence[Judged]) -> str:
    verdicts = [each.verdict for each in rows]
    wrong = verdicts.count("does_not_fit" if ran else "fits")
    happened, name = ("ran", "false refusals") if ran else ("out of memory", "false fits")
    return (
        f"| {source} | {len(rows)} | {happened} | {verdicts.count('fits')} "
        f"| {verdicts.count('tight')} | {verdicts.count('does_not_fit')} | {wrong} {name} | "
        f"{upper_bound(wrong, len(rows)):.1%} |"
    )
