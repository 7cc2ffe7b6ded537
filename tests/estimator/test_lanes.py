"""Many polynomials in one number: the same values as one after another, whatever their size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.eager.size import Lanes, Polynomial, powers

coefficients = st.integers(0, 2**40)
polynomials = st.lists(st.tuples(*[coefficients] * 8), min_size=1, max_size=6)


def one_by_one(several: list[Polynomial], b: int, s: int, t: int) -> tuple[int, ...]:
    """Return the values as the table of monomials in `size.py` reads."""
    return tuple(
        c[0] + c[1] * b + c[2] * s + c[3] * b * s + c[4] * s * s + c[5] * b * s * s
        + c[6] * b * t + c[7] * b * s * t
        for c in several
    )  # fmt: skip


@given(polynomials, st.integers(1, 2**16), st.integers(1, 2**24), st.integers(0, 2**24))
def test_values_are_those_of_each_polynomial_even_beyond_64_bits(several, b, s, t):
    assert Lanes(several).at(powers(b, s, t)) == one_by_one(several, b, s, t)


@pytest.mark.parametrize("value", [2**64 - 1, 2**64, 2**64 + 1])
def test_the_last_value_that_fits_a_lane_and_the_first_that_does_not(value):
    several = [(value, 0, 0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0)]
    assert Lanes(several).at(powers(1, 1)) == (value, 1)


def test_what_is_negative_takes_nothing_from_its_neighbour():
    several = [(-5, 0, 7, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0), (0, -3, 0, 0, 0, 0, 0, 0)]
    assert Lanes(several).at(powers(2, 10)) == (65, 1, -6)
