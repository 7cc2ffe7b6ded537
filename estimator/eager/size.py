"""Sizes that are known before the micro-batch and the length are: one monomial in b, s and t.

s is the length that the layers run at. t is the second length of runs with virtual tokens: the
tokens of the text where virtual ones are put before them, the keys where a prefix lies in the
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from struct import Struct
from typing import Final

import msgspec

# Exponents of (b, s, t) in the order in which polynomials list coefficients.
MONOMIALS: Final[tuple[tuple[int, int, int], ...]] = (
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (1, 2, 0), (1, 0, 1), (1, 1, 1),
)  # fmt: skip
Polynomial = tuple[int, int, int, int, int, int, int, int]
ZERO: Final[Polynomial] = (0, 0, 0, 0, 0, 0, 0, 0)


class Dim(msgspec.Struct, frozen=True, eq=False):
    """One dimension of a shape: a number with the letter that formulas use, or b, s or t itself."""

    letter: str
    value: int
    power: tuple[int, int, int] = (0, 0, 0)

    def __str__(self) -> str:
        return self.letter


BATCH: Final = Dim("b", 1, (1, 0, 0))
SEQ: Final = Dim("s", 1, (0, 1, 0))
SECOND: Final = Dim("t", 1, (0, 0, 1))
ONE: Final = Dim("1", 1)
# One position less than s. Sums count it as s; what the allocator is asked for is one less.
SHIFTED: Final = Dim("s-1", 1, (0, 1, 0))

Shape = tuple[Dim, ...]


@cache
def dim(letter: str, value: int) -> Dim:
    """Return the dimension of this letter and value; the same object every time."""
    return Dim(letter, value)


@cache
def elements(shape: Shape) -> tuple[int, int]:
    """Count the elements of a shape: (coefficient, index of its monomial in b, s and t)."""
    coefficient, in_batch, in_seq, in_second = 1, 0, 0, 0
    for each in shape:
        coefficient *= each.value
        in_batch += each.power[0]
        in_seq += each.power[1]
        in_second += each.power[2]
    return coefficient, MONOMIALS.index((in_batch, in_seq, in_second))


_LANE_BITS: Final = 64


class Lanes:
    """Many polynomials as one: each has 64 bits of the digits of one long number.

    A product of such a number with a power of the micro-batch and length evaluates a monomial of
    them all. One lane more, on top, holds what no polynomial exceeds, and tells when 64 bits are
    not enough.

    Example:
        >>> few = Lanes([(5, 1, 0, 0, 0, 0, 0, 0), (0, 0, 3, 0, 0, 0, 0, 0)])
        >>> few.at(powers(4, 100))
        (9, 300)
    """

    def __init__(self, polynomials: Sequence[Polynomial]) -> None:
        self._polynomials = tuple(polynomials)
        self._top = _LANE_BITS * len(self._polynomials)
        self._lanes = Struct(f"<{len(self._polynomials)}Q")
        # What is negative would borrow from its neighbour.
        self._packs = all(each >= 0 for one in polynomials for each in one)
        self._columns = tuple(
            (index, _packed((*column, max(column))))
            for index, column in enumerate(zip(*self._polynomials, strict=True))
            if any(column)
        )

    def at(self, at: Polynomial) -> tuple[int, ...]:
        """Return the value of each polynomial, in their order."""
        if self._packs:
            packed = 0
            for index, column in self._columns:
                packed += column * at[index]
            most = packed >> self._top
            if not most >> _LANE_BITS:
                packed -= most << self._top
                return self._lanes.unpack(packed.to_bytes(self._lanes.size, "little"))
        return tuple(evaluate(each, at) for each in self._polynomials)


def _packed(lanes: Sequence[int]) -> int:
    return sum(each << _LANE_BITS * lane for lane, each in enumerate(lanes))


def evaluate(polynomial: Polynomial, at: Polynomial) -> int:
    """Return the value of one polynomial."""
    a, b = polynomial, at
    low = a[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4] + a[5] * b[5]
    return low + a[6] * b[6] + a[7] * b[7]


def powers(micro_batch_size: int, seq_len: int, second: int = 0) -> Polynomial:
    """Return the value of every monomial at one micro-batch, length and second length."""
    b, s, t = micro_batch_size, seq_len, second
    return (1, b, s, b * s, s * s, b * s * s, b * t, b * s * t)


def asked_bytes(shape: Shape, width: int, at: Polynomial) -> int:
    """Return what the allocator is asked for at given powers of b, s and t [bytes].

    Example:
        >>> asked_bytes((BATCH, SHIFTED, Dim("V", 10)), 2, powers(3, 5))
        240
    """
    count, monomial = elements(shape)
    size = at[monomial]
    if SHIFTED in shape:
        in_batch, in_seq, in_second = MONOMIALS[monomial]
        size -= at[MONOMIALS.index((in_batch, in_seq - 1, in_second))]
    return count * width * size
