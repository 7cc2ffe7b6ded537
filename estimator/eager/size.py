"""Sizes that are known before the micro-batch and the length are: one monomial in b and s."""

from __future__ import annotations

from functools import cache
from typing import Final

from msgspec import Struct

# Exponents of (micro_batch_size, seq_len) in the order in which polynomials list coefficients.
MONOMIALS: Final[tuple[tuple[int, int], ...]] = (
    (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
)  # fmt: skip
Polynomial = tuple[int, int, int, int, int, int]
ZERO: Final[Polynomial] = (0, 0, 0, 0, 0, 0)


class Dim(Struct, frozen=True, eq=False):
    """One dimension of a shape: a number with the letter that formulas use, or b or s itself."""

    letter: str
    value: int
    power: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return self.letter


BATCH: Final = Dim("b", 1, (1, 0))
SEQ: Final = Dim("s", 1, (0, 1))
ONE: Final = Dim("1", 1)

Shape = tuple[Dim, ...]


@cache
def dim(letter: str, value: int) -> Dim:
    """Return the dimension of this letter and value; the same object every time."""
    return Dim(letter, value)


@cache
def elements(shape: Shape) -> tuple[int, int]:
    """Count the elements of a shape: (coefficient, index of its monomial in b and s)."""
    coefficient, in_batch, in_seq = 1, 0, 0
    for each in shape:
        coefficient *= each.value
        in_batch += each.power[0]
        in_seq += each.power[1]
    return coefficient, MONOMIALS.index((in_batch, in_seq))


def powers(micro_batch_size: int, seq_len: int) -> Polynomial:
    """Return the value of every monomial at one micro-batch and length."""
    b, s = micro_batch_size, seq_len
    return (1, b, s, b * s, s * s, b * s * s)
