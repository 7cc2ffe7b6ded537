"""What is predicted for a live run, phase by phase, at the batches that it really sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from msgspec.structs import replace

from estimator.memory.loading import LOADING
from estimator.record import Meters, PhasePeak
from estimator.request import EstimateRequest
from estimator.result import Range, Result
from estimator.service import estimate
from estimator.units import gib

UPDATE: Final = "optimizer step"
# The Trainer tells its callbacks of the update when the gradients are clipped already, so that
# clipping cannot be told from what comes before it.
BEFORE_UPDATE: Final = "forward to gradient clipping"
STEP: Final = "step"


class Shape(NamedTuple):
    """The batch of one micro-step: its rows, their length, whether some of it is padding."""

    rows: int
    seq_len: int
    padding: bool


class Line(NamedTuple):
    """One phase: what was predicted of `max_memory_allocated` and what it read [bytes]."""

    phase: str
    predicted: Range
    measured: int

    @property
    def is_inside(self) -> bool:
        """Whether the measurement lies within the predicted range."""
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(slots=True)
class Forecast:
    """The answers of the analytic engine for one recipe, by shape."""

    request: EstimateRequest
    answers: dict[Shape, Result] = field(default_factory=dict)

    def at(self, shape: Shape) -> Result:
        """Return the answer for one batch."""
        if shape not in self.answers:
            self.answers[shape] = estimate(self.request_at(shape))
        return self.answers[shape]

    def request_at(self, shape: Shape) -> EstimateRequest:
        """Return the request with the batch that was seen in place of the one expected."""
        return replace(
            self.request,
            micro_batch_size=shape.rows,
            seq_len=shape.seq_len,
            padding=shape.padding and not self.request.packing,
        )

    def lines(self, shape: Shape, phases: tuple[PhasePeak, ...], whole: Meters) -> list[Line]:
        """Return what was predicted and measured of each phase, and of the whole step."""
        answer = self.at(shape)
        expected = {
            BEFORE_UPDATE: [
                each.bytes for each in answer.timeline if each.moment not in (LOADING, UPDATE)
            ],
            UPDATE: [each.bytes for each in answer.timeline if each.moment == UPDATE],
        }
        found = [
            Line(each.phase, _around(max(expected[each.phase]), answer), each.peak.allocated_bytes)
            for each in phases
            if expected[each.phase] and each.peak.allocated_bytes is not None
        ]
        if whole.allocated_bytes is not None:
            found.append(Line(STEP, answer.peak.allocated_bytes, whole.allocated_bytes))
        return found


def _around(expected: int, answer: Result) -> Range:
    """Return the range of a phase: as wide as that of the peak, in proportion."""
    peak = answer.peak.allocated_bytes
    return Range(
        expected * peak.low // peak.expected, expected, expected * peak.high // peak.expected
    )


def table(lines: list[Line]) -> str:
    """Return the lines as text, with the difference measured less predicted.

    Example:
        >>> print(table([Line("step", Range(2**30, 2**31, 2**32), 3 * 2**30)]))
        allocated                       predicted         (low to high)     measured
        step                             2.00 GiB    (1.00 to 4.00 GiB)     3.00 GiB  +50.00 %
    """
    rows = [f"{'allocated':28} {'predicted':>12} {'(low to high)':>21} {'measured':>12}"]
    for each in lines:
        low, high = gib(each.predicted.low).removesuffix(" GiB"), gib(each.predicted.high)
        difference = (each.measured / each.predicted.expected - 1) * 100
        rows.append(
            f"{each.phase:28} {gib(each.predicted.expected):>12} {f'({low} to {high})':>21} "
            f"{gib(each.measured):>12} {difference:>+7.2f} %"
        )
    return "\n".join(rows)
