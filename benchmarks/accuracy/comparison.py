"""Published runs beside our answers to the same requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.accuracy.meters import Meter, estimated, readings
from benchmarks.accuracy.published import Row
from benchmarks.accuracy.recipes import InexpressibleError, request_of
from estimator.catalog import Access
from estimator.errors import UnknownModelError, UnsupportedModelError
from estimator.pipeline import answer
from estimator.request import EstimateRequest, parse_request
from estimator.result import Range, Result
from estimator.service import model_config, requested_gpu


@dataclass(frozen=True, slots=True)
class Answered:
    """A published run that the request document can express, and our answer."""

    row: Row
    request: EstimateRequest
    result: Result


@dataclass(frozen=True, slots=True)
class Reading:
    """What one meter read, and our range of it [bytes]."""

    meter: Meter
    measured: float
    estimated: Range

    @property
    def error(self) -> float:
        """The signed relative error of the expected value."""
        return self.estimated.expected / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measurement lies in the range of the answer."""
        return self.estimated.low <= self.measured <= self.estimated.high


@dataclass(frozen=True, slots=True)
class Comparison(Reading):
    """One meter of a published run."""

    run: Answered


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of a list of published rows."""

    answered: tuple[Answered, ...]
    refused: tuple[tuple[Row, str], ...]

    @property
    def reasons(self) -> dict[str, list[Row]]:
        """The rows without an answer by reason, the most frequent first."""
        counts = Counter(reason for _, reason in self.refused)
        ranked = sorted(counts, key=lambda reason: (-counts[reason], reason))
        return {each: [row for row, reason in self.refused if reason == each] for each in ranked}


def answers(rows: Iterable[Row]) -> Answers:
    """Answer every row that can be expressed, and keep the reason for every other."""
    answered, refused = [], []
    for row in rows:
        try:
            answered.append(_answer(row))
        except InexpressibleError as error:
            refused.append((row, str(error)))
    return Answers(tuple(answered), tuple(refused))


def _answer(row: Row) -> Answered:
    request = parse_request(request_of(row))
    try:
        model = model_config(request, Access.CATALOGUE)
    except UnknownModelError:
        raise InexpressibleError(f"model not in the catalogue: {row.model}") from None
    try:
        result = answer(request, model.config, model.id, requested_gpu(request))
    except UnsupportedModelError:
        family = model.config["model_type"]
        raise InexpressibleError(f"model family without a specification: {family}") from None
    return Answered(row, request, result)


def comparisons(runs: Iterable[Answered]) -> tuple[Comparison, ...]:
    """Return every meter of every run beside our value of the same quantity."""
    return tuple(
        Comparison(meter, measured, estimated(run.result.peak, meter), run)
        for run in runs
        for meter, measured in readings(run.row)
    )
