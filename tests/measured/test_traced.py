"""The kept dry runs of published rows are what the dry run gives today."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import traced
from benchmarks.accuracy.comparison import answers
from benchmarks.accuracy.published import measured
from estimator.catalog import Access
from estimator.request import parse_request
from estimator.service import model_config

KEPT = traced.read()


def test_every_row_that_the_installed_software_can_run_is_kept():
    wanted = {name for name, _ in traced.candidates(answers(measured()).answered)}
    assert {each.id for each in KEPT} == wanted


@pytest.mark.parametrize("name", ["lomo-t2-7b-lomo-1gpu"])
def test_a_kept_dry_run_comes_out_again(name):
    from profiler.engine import dry_run

    (kept,) = (each for each in KEPT if each.id == name)
    request = parse_request(kept.request)
    found = dry_run(request, model_config(request, Access.CATALOGUE).config)
    assert found.peak.allocated_bytes.expected == kept.allocated_bytes
    assert found.peak.reserved_bytes.expected == kept.reserved_bytes
