"""The fast part of the grid: the analytic engine agrees with the dry run."""

from __future__ import annotations

import pytest

from tests.conformance.cases import cases
from tests.conformance.compare import compare

CASES = list(cases())
FAST = [case for case in CASES if case.fast]


def test_the_grid_is_as_large_as_promised():
    assert len(CASES) >= 400
    assert len(FAST) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", FAST, ids=[case.name for case in FAST])
def test_the_engines_agree_on_bytes_and_moment(case):
    found = compare(case.name, case.document)
    assert abs(found.error) <= 0.01
    assert found.same_moment
