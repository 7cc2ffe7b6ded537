"""What the peers answer beside the measurements, and beside our answers to the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean, median

from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.meters import Meter, readings
from benchmarks.accuracy.published import Row, measured
from benchmarks.peers.results import Answer, read


@dataclass(frozen=True, slots=True)
class Pair:
    """One meter of a published run, a peer's figure for it, and ours if there is one [bytes]."""

    peer: str
    row: Row
    meter: Meter
    measured: float
    theirs: int
    ours: Comparison | None

    @property
    def group(self) -> tuple[str, Meter]:
        """The source and the meter."""
        return self.row.source_group, self.meter

    @property
    def error(self) -> float:
        """The peer's signed relative error."""
        return self.theirs / self.measured - 1


@dataclass(frozen=True, slots=True)
class Spread:
    """How signed errors lie: sizes by median and 90th percentile, the worst, and the mean."""

    median: float
    ninetieth: float
    worst: float
    bias: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> Spread:
        """Return the spread of some errors; the percentile is by nearest rank."""
        sizes = sorted(abs(error) for error in errors)
        rank = max(0, ceil(0.9 * len(sizes)) - 1)
        return cls(median(sizes), sizes[rank], max(errors, key=abs), fmean(errors))


def figure(answer: Answer, meter: Meter) -> int | None:
    """Return the peer's figure that is nearest to a meter [bytes].

    That is its total; for an allocated peak the part that the peer itself says is the allocator's,
    where it says so.
    """
    if meter == "allocated" and answer.allocated_bytes is not None:
        return answer.allocated_bytes
    return answer.bytes


def pairs(found: Iterable[Comparison]) -> tuple[Pair, ...]:
    """Return every scored measurement that a peer answers, with our answer where there is one."""
    ours = {(each.run.row.id, each.meter): each for each in found}
    answers = read()
    peers = dict.fromkeys(peer for peer, _ in answers)
    return tuple(
        Pair(peer, row, meter, value, theirs, ours.get((row.id, meter)))
        for peer in peers
        for row in measured()
        if row.scored and (peer, row.id) in answers
        for meter, value in readings(row)
        if (theirs := figure(answers[peer, row.id], meter)) is not None
    )
