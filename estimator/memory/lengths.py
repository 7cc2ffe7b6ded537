"""Batches of different lengths: which of them make the allocator hold more.

A batch that is padded to its longest sample asks for blocks of its own sizes. What it frees stays
with the allocator, and serves later batches that are no longer; a longer one finds the blocks too
small and takes new segments. So how much is held in the end depends on the order in which the
longest so far came. Shorter batches between them cut up the blocks of longer ones, most of all at
the beginning, when the optimizer's states are made; later on they find room.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from random import Random
from typing import Final, NamedTuple

from estimator.units import gib

ORDERS: Final = 39
"""Random orders of the samples that are replayed; the middle one is the expected one.

Another order lies between the least and the most of so many in 38 cases of 40, which is 95 %.
"""
FIRST: Final = 6
"""Batches that are replayed as they come; of later ones those that are longer than all before."""
ADAPTER_SHARE: Final = 0.05
"""Where no larger share of the weights is trained, the optimizer's states are small beside what a
batch frees, and only the very first batch is replayed as it comes."""


FIRST_BATCH: Final = 2 / 3
"""Length of the first batch as a share of the longest, where the lengths of samples are not known.

The optimizer's states are made behind the first batch, among the blocks that it freed; those are
too small for the next, and what lies in them keeps them from being given back.
"""


class Lengths(NamedTuple):
    """What is known of the lengths of batches.

    Args:
        samples: tokens of each sample, in no order; none where all batches are of one length, and
            where nothing is known.
        unknown: whether nothing is known.
    """

    samples: tuple[int, ...] = ()
    unknown: bool = False


ALIKE: Final = Lengths()
UNKNOWN: Final = Lengths(unknown=True)


def lengths_of(sample_lengths: tuple[int, ...], seq_len: int, *, packing: bool) -> Lengths:
    """Return what a request says of the lengths of its batches.

    Args:
        sample_lengths: of the samples [tokens], as the request has them.
        seq_len: what they are cut to [tokens].
        packing: whether samples are packed end to end to that length.

    Example:
        >>> lengths_of((), 512, packing=False).unknown
        True
    """
    if packing or (sample_lengths and min(sample_lengths) >= seq_len):
        return ALIKE
    return Lengths(sample_lengths) if sample_lengths else UNKNOWN


def orders(
    sample_lengths: Sequence[int], rows: int, longest: int, first: int = FIRST
) -> tuple[tuple[int, ...], ...]:
    """Return the batches that count in some random orders of the samples.

    The orders are a Latin hypercube, which spreads few draws evenly: of the first batches each
    comes from another part of the distribution, and so do the second and all later ones.

    Args:
        sample_lengths: of the samples [tokens], each as likely as any other.
        rows: samples in one batch.
        longest: what samples are cut to [tokens], and the length of the longest.
        first: batches that are taken as they come.

    Returns:
        Lengths [tokens] for each order; the last is the longest.

    Source: latin-hypercube, LatinHypercube.

    Example:
        >>> {each[-1] for each in orders([10, 20, 30], rows=1, longest=30)}
        {30}
    """
    draws = _Draws()
    return tuple(
        history(sample_lengths, rows, longest, draws.of(order), first) for order in range(ORDERS)
    )


def history(
    sample_lengths: Sequence[int],
    rows: int,
    longest: int,
    draw: Iterator[float],
    first: int = FIRST,
) -> tuple[int, ...]:
    """Return the first batches of one order, and those after them that are longer than all before.

    Args:
        draw: numbers from 0 up to 1: for a batch, the share of all batches that are no longer; for
            one of those after, the share among batches that are longer than all before.

    Example:
        >>> history([10, 20, 30], rows=1, longest=30, draw=iter([0.1] * 6 + [0.6]))
        (10, 10, 10, 10, 10, 10, 30)
    """
    counts = Counter(min(each, longest) for each in sample_lengths)
    lengths = sorted(counts)
    # A batch is no longer than a length when none of its samples is.
    shares = [
        (each / len(sample_lengths)) ** rows
        for each in accumulate(counts[length] for length in lengths)
    ]

    def place(share: float) -> int:
        return min(bisect_right(shares, share), len(shares) - 1)

    found = [place(next(draw)) for _ in range(first)]
    most = max(found)
    while lengths[most] < lengths[-1]:
        most = place(shares[most] + (1.0 - shares[most]) * next(draw))
        found.append(most)
    if lengths[found[-1]] < lengths[-1]:
        found.append(len(lengths) - 1)
    return tuple(lengths[each] for each in found)


class _Draws:
    """Numbers from 0 up to 1: those of one place lie one in each of as many parts as orders."""

    def __init__(self) -> None:
        self._random = Random(0)  # noqa: S311 - an order of samples, no secret
        self._parts: list[list[int]] = []

    def of(self, order: int) -> Iterator[float]:
        """Yield the numbers of one order, place by place."""
        for place in count():
            if place == len(self._parts):
                self._parts.append(self._shuffled())
            yield (self._parts[place][order] + self._random.random()) / ORDERS

    def _shuffled(self) -> list[int]:
        # `random` is the one method whose numbers Python promises to keep from version to version.
        keyed = sorted((self._random.random(), part) for part in range(ORDERS))
        return [part for _, part in keyed]


def reason(least: int, most: int) -> str:
    """Say where what the allocator holds comes from, and why the verdict does not count it."""
    return (
        f"reserved and device used are those of the middle one of {ORDERS} random orders of the "
        f"samples, which hold {gib(least)} to {gib(most)}: every batch that is longer "
        "than all before it takes new segments; those with nothing in them are given back under "
        "pressure and do not count for the verdict"
    )
