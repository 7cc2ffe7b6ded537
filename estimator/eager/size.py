"""Sizes that are known before the micro-batch and the length are: one monomial in b, s and t.

s is the length that the layers run at. t is the second length of runs with virtual tokens: the
tokens of the text where virtual ones are put before them, the keys where a prefix lies in the
cache.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from msgspec import Struct

# Exponents of (b, s, t) in the order in which polynomials list coefficients.
MONOMIALS: Final[tuple[tuple[int, int, int], ...]] = (
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (1, 2, 0), (1, 0, 1), (1, 1, 1),
)  # fmt: skip
Polynomial = tuple[int, int, int, int, int, int, int, int]
ZERO: Final[Polynomial] = (0, 0, 0, 0, 0, 0, 0, 0)


class Dim(Struct, frozen=True, eq=False):
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


def powers(micro_batch_size: int, seq_len: int, second: int = 0) -> Polynomial:
    """Return the value of every monomial at one micro-batch, length and second length."""
    b, s, t = micro_batch_size, seq_len, second
    return (1, b, s, b * s, s * s, b * s * s, b * t, b * s * t)
