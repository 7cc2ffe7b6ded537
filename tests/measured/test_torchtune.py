"""torchtune's own code, run on fake tensors, beside our answers for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estimator.memory.loading import LOADING, loading
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.result import MomentBytes, Result

RECORDS = Path(__file__).parents[2] / "data" / "measurements" / "torchtune.json"
RUNS = json.loads(RECORDS.read_text(encoding="utf-8"))["runs"]


def _name(run: dict[str, Any]) -> str:
    return f"{run['request']['software']['version']}: {run['name']}"


def _answer(run: dict[str, Any]) -> Result:
    request = parse_request(run["request"])
    return answer(request, run["request"]["model"]["config"], run["name"], None)


def _highest(result: Result) -> MomentBytes:
    """Return the highest moment of the step, which loading the model is no part of."""
    return max((each for each in result.timeline if each.moment != LOADING), key=_tensors)


def _tensors(moment: MomentBytes) -> int:
    """Return a moment without the allocator's rounding, which the dry run does not count here."""
    return moment.bytes - moment.components.get("runtime", 0)


def _tolerance(run: dict[str, Any]) -> float:
    """The loss of 0.1 runs over s - 1 positions, which are counted as s."""
    return 0.003 if run["request"]["software"]["version"] == "0.1" else 0.0001


@pytest.mark.parametrize("run", RUNS, ids=_name)
def test_tensors_are_those_of_torchtunes_own_step(run):
    highest = _highest(_answer(run))
    assert _tensors(highest) == pytest.approx(run["requested_bytes"], rel=_tolerance(run))
    assert highest.moment.startswith(run["peak"])


# torchtune 0.3 keeps packed layers without an adapter twice, which is said to be left out.
KEPT_TWICE = "0.3: qlora, adapters on some"


@pytest.mark.parametrize("run", [each for each in RUNS if _name(each) != KEPT_TWICE], ids=_name)
def test_loading_takes_what_torchtunes_own_builders_take(run):
    config = run["request"]["model"]["config"]
    sizes: dict[int, int] = {}
    totals = [0]
    for event in loading(resolve(parse_request(run["request"]), config, run["name"])):
        if event.size is not None:
            sizes[event.serial] = event.size
        totals.append(totals[-1] + (event.size or -sizes.pop(event.serial)))
    # Scratch of a megabyte and less is left out.
    assert max(totals) == pytest.approx(run["loading"]["highest_bytes"], rel=0.001)
    assert totals[-1] == pytest.approx(run["loading"]["left_bytes"], rel=0.0001)


@pytest.mark.parametrize("run", RUNS, ids=_name)
def test_parameters_are_counted_as_torchtunes_model_has_them(run):
    counted = _answer(run).parameters
    assert counted.total == run["total_parameters"]
    assert counted.trainable == run["trainable_parameters"]
