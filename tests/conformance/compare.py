"""Both engines on one case, and the difference between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from estimator.errors import EstimatorError
from estimator.memory.loading import LOADING
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.result import MomentBytes, Result

SAME_MOMENT_SHARE = 0.001


@dataclass(frozen=True)
class Comparison:
    """Two answers to one request, in bytes of `allocated` and by moment.

    Args:
        analytic, dry_run: expected allocated bytes at the peak, in whole blocks.
        requested: the same two peaks without the allocator's rounding: the tensors alone.
        moments: the phase of the peak in each engine.
        tied: the dry run's two highest phases are within 0.1 % of each other, so that either may
            be called the peak.
        refused: the reason, where both engines refuse the case.
    """

    name: str
    analytic: int
    dry_run: int
    requested: tuple[int, int]
    moments: tuple[str, str]
    tied: bool
    refused: str = ""

    @property
    def error(self) -> float:
        """The analytic engine's relative error; the dry run is the judge."""
        return (self.analytic - self.dry_run) / self.dry_run if self.dry_run else 0.0

    @property
    def tensor_error(self) -> float:
        """The same for the tensors alone."""
        analytic, dry_run = self.requested
        return (analytic - dry_run) / dry_run if dry_run else 0.0

    @property
    def same_moment(self) -> bool:
        """Whether both engines name the same phase, or the phases are level."""
        return self.moments[0] == self.moments[1] or self.tied


def compare(name: str, document: dict[str, Any]) -> Comparison:
    """Run both engines on one request.

    Raises:
        EstimatorError: one engine refuses what the other answers.
    """
    from profiler import engine, trace

    request = parse_request(document)
    config = document["model"]["config"]
    try:
        formula: Result | EstimatorError = answer(request, config, name, None)
    except EstimatorError as error:
        formula = error
    try:
        reading = trace.read(engine.trace(request, config))
    except EstimatorError as error:
        if isinstance(formula, EstimatorError):
            return Comparison(name, 0, 0, (0, 0), ("", ""), True, refused=str(error))
        raise
    if isinstance(formula, EstimatorError):
        raise formula
    step = highest_of_the_step(formula)
    ranked = sorted((point.allocated_bytes for point in reading.points), reverse=True)
    level = len(ranked) > 1 and ranked[0] - ranked[1] <= SAME_MOMENT_SHARE * ranked[0]
    return Comparison(
        name=name,
        analytic=step.bytes,
        dry_run=reading.peak.allocated_bytes,
        requested=(step.bytes - step.components.get("runtime", 0), reading.peak.requested_bytes),
        moments=(phase(step.moment), reading.peak.phase),
        tied=level,
    )


def highest_of_the_step(result: Result) -> MomentBytes:
    """Return the peak of the training step; the dry run begins with the model on the device."""
    return max((each for each in result.timeline if each.moment != LOADING), key=_bytes)


def _bytes(moment: MomentBytes) -> int:
    return moment.bytes


def phase(moment: str) -> str:
    """Return the phase of a moment, as the dry run names phases.

    Example:
        >>> phase("backward: layer")
        'backward'
    """
    if moment == "end of backward":
        return "backward"
    return moment.split(":", 1)[0]
