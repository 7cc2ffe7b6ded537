"""The statistics of the accuracy page, against printed tables and another library's figures."""

from __future__ import annotations

import random

import pytest

from benchmarks.accuracy.statistics import errors, nearest_rank, upper_bound


@pytest.mark.parametrize(
    ("failures", "trials", "bound"),
    [
        # Hanley and Lippman-Hand, JAMA 249 (1983) 1743: no failure in n trials leaves 3 / n.
        (0, 300, 3 / 300),
        (0, 1000, 3 / 1000),
        # 1 - 0.05 ** (1 / n), the same bound without the approximation.
        (0, 10, 1 - 0.05**0.1),
        (10, 10, 1.0),
    ],
)
def test_few_failures_leave_a_bound(failures, trials, bound):
    assert upper_bound(failures, trials) == pytest.approx(bound, rel=0.01)


def test_the_bound_is_where_so_few_failures_get_unlikely():
    """Drawn ten thousand times at the bound, 2 of 50 or fewer come up 5 times in a hundred."""
    draw, bound = random.Random(7), upper_bound(2, 50)
    rare = sum(sum(draw.random() < bound for _ in range(50)) <= 2 for _ in range(10_000))
    assert rare / 10_000 == pytest.approx(0.05, abs=0.01)


def test_percentiles_are_by_nearest_rank():
    found = errors([0.01, -0.02, 0.03, -0.04])
    assert (found.median, found.p90, found.worst) == (pytest.approx(0.025), 0.04, -0.04)
    assert found.bias == pytest.approx(-0.005)
    assert nearest_rank([3.0, 1.0, 2.0], 0.34) == 2.0
