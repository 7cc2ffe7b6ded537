"""torchtune's own code, run on fake tensors, beside our answers for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.result import Result

RECORDS = Path(__file__).parents[2] / "data" / "measurements" / "torchtune.json"
RUNS = json.loads(RECORDS.read_text(encoding="utf-8"))["runs"]


def _name(run: dict[str, Any]) -> str:
    return f"{run['request']['software']['version']}: {run['name']}"


def _answer(run: dict[str, Any]) -> Result:
    request = parse_request(run["request"])
    return answer(request, run["request"]["model"]["config"], run["name"], None)


def _tensors(result: Result) -> int:
    """Return the peak without the allocator's rounding, which the dry run does not count here."""
    rows = (row for part in result.breakdown for row in part.rows)
    rounding = sum(row.bytes for row in rows if row.name == "allocator rounding")
    return result.peak.allocated_bytes.expected - rounding


def _tolerance(run: dict[str, Any]) -> float:
    """The loss of 0.1 runs over s - 1 positions, which are counted as s."""
    return 0.003 if run["request"]["software"]["version"] == "0.1" else 0.0001


@pytest.mark.parametrize("run", RUNS, ids=_name)
def test_tensors_are_those_of_torchtunes_own_step(run):
    result = _answer(run)
    assert _tensors(result) == pytest.approx(run["requested_bytes"], rel=_tolerance(run))
    assert result.peak.moment.startswith(run["peak"])


@pytest.mark.parametrize("run", RUNS, ids=_name)
def test_parameters_are_counted_as_torchtunes_model_has_them(run):
    counted = _answer(run).parameters
    assert counted.total == run["total_parameters"]
    assert counted.trainable == run["trainable_parameters"]
