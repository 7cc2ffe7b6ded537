"""One reading of one meter beside our range of it, whoever measured it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.accuracy.comparison import Comparison, Reading
from benchmarks.accuracy.meters import Meter, estimated
from estimator.catalog import Access
from estimator.pipeline import answer
from estimator.record import Run
from estimator.request import EstimateRequest, parse_request
from estimator.service import model_config, requested_gpu
from estimator.traits import kind_of


@dataclass(frozen=True, slots=True)
class Point(Reading):
    """A reading with what the tables sort it by, whoever measured it.

    Args:
        group: the publication, or the campaign on a card.
        family: the model's `model_type`.
    """

    group: str
    request: EstimateRequest
    family: str

    @property
    def width(self) -> float:
        """How far the range reaches, low to high, as a share of the expected value."""
        return (self.estimated.high - self.estimated.low) / self.estimated.expected

    @property
    def strata(self) -> Iterator[tuple[str, str]]:
        """Yield each stratum that the reading belongs to, as a pair of kind and value."""
        request = self.request
        autocast = f" + autocast {request.autocast}" if request.autocast else ""
        yield "method", kind_of(request)
        yield "precision", f"{request.precision}{autocast}"
        yield "checkpointing", request.activation_checkpointing
        yield "optimizer", request.optimizer.name
        yield "attention", request.attention
        yield "family", self.family
        yield "software", f"{request.software.framework} {request.software.version}"


def published(found: Iterable[Comparison]) -> tuple[Point, ...]:
    """Return the readings of the published rows that count."""
    return tuple(
        Point(
            group=each.run.row.source_group,
            meter=each.meter,
            measured=each.measured,
            estimated=each.estimated,
            request=each.run.request,
            family=_family(each.run.request),
        )
        for each in found
        if each.run.row.scored
    )


def recorded(runs: Iterable[Run]) -> tuple[Point, ...]:
    """Return the readings of measurement records that ran through without a limit."""
    return tuple(
        point
        for run in runs
        if run.outcome == "ok" and run.limit_bytes is None
        for point in _of_run(run)
    )


def _of_run(run: Run) -> Iterator[Point]:
    request = parse_request(dict(run.request))
    model = model_config(request, Access.CATALOGUE)
    peak = answer(request, model.config, model.id, requested_gpu(request)).peak
    readings: tuple[tuple[Meter, int | None], ...] = (
        ("allocated", run.peak.allocated_bytes),
        ("reserved", run.peak.reserved_bytes),
        ("device-used", run.peak.device_used_bytes),
    )
    group = f"{run.group} on {run.environment.gpu_id or run.environment.gpu}"
    for meter, value in readings:
        if value is not None:
            yield Point(meter, value, estimated(peak, meter), group, request, _family(request))


def _family(request: EstimateRequest) -> str:
    return str(model_config(request, Access.CATALOGUE).config.get("model_type", "unknown"))
