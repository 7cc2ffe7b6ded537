"""What is said about a list of errors, and how sure a share of few cases can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, comb
from statistics import fmean, median
from typing import Final

_STEPS: Final = 60


@dataclass(frozen=True, slots=True)
class Errors:
    """The sizes of signed relative errors; percentiles are by nearest rank."""

    count: int
    bias: float
    median: float
    p90: float
    p95: float
    p99: float
    worst: float

    @property
    def cells(self) -> str:
        """The figures as the cells of a table's row."""
        sizes = (self.median, self.p90, self.p95, self.p99)
        shown = (f"{self.bias:+.2%}", *(f"{each:.2%}" for each in sizes), f"{self.worst:+.2%}")
        return " | ".join((str(self.count), *shown))


COLUMNS: Final = "rows | bias | median | 90th | 95th | 99th | worst"
RULE: Final = "---:|---:|---:|---:|---:|---:|---:"


def errors(values: Sequence[float]) -> Errors:
    """Return what is said about signed relative errors."""
    sizes = [abs(value) for value in values]
    return Errors(
        count=len(values),
        bias=fmean(values),
        median=median(sizes),
        p90=nearest_rank(sizes, 0.90),
        p95=nearest_rank(sizes, 0.95),
        p99=nearest_rank(sizes, 0.99),
        worst=max(values, key=abs),
    )


def nearest_rank(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed.

    Example:
        >>> nearest_rank([1.0, 2.0, 3.0, 4.0], 0.5)
        2.0
    """
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def upper_bound(failures: int, trials: int, confidence: float = 0.95) -> float:
    """Return the largest share of failures that so few of them leave plausible.

    The one-sided bound of Clopper and Pearson: the share at which as few failures as these, or
    fewer, would come up in 1 - confidence of all such series of trials.

    Example:
        >>> round(upper_bound(0, 59), 4)
        0.0495
    """
    if failures >= trials:
        return 1.0
    return _root(lambda share: _at_most(failures, trials, share) - (1 - confidence))


def _at_most(failures: int, trials: int, share: float) -> float:
    return sum(
        comb(trials, count) * share**count * (1 - share) ** (trials - count)
        for count in range(failures + 1)
    )


def _root(falling: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high
