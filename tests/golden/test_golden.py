"""Whole requests with their whole answers: whatever changes an answer shows as a difference.

`pytest tests/golden --update-golden` writes the expected documents again. That a document did not
change proves nothing about it being right; the other tests do.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from estimator.render.document import to_json
from estimator.result import Result
from estimator.service import estimate

HERE = Path(__file__).parent
EXPECTED = HERE / "expected"
REQUESTS: dict[str, dict[str, Any]] = json.loads((HERE / "requests.json").read_bytes())


@cache
def _answer(name: str) -> Result:
    return estimate(REQUESTS[name])


def _expected(name: str) -> Path:
    return EXPECTED / f"{name}.json"


@pytest.mark.parametrize("name", REQUESTS)
def test_the_answer_is_the_one_on_record(name, request):
    found = to_json(_answer(name))
    if request.config.getoption("--update-golden"):
        EXPECTED.mkdir(exist_ok=True)
        _expected(name).write_bytes(found)
    recorded = _expected(name)
    assert recorded.exists(), "no document yet: pytest tests/golden --update-golden"
    # Compared as values first: a difference is shown field by field then.
    assert json.loads(found) == json.loads(recorded.read_bytes())
    assert found == recorded.read_bytes()


def test_every_document_on_record_has_its_request():
    on_record = {path.stem for path in EXPECTED.glob("*.json")}
    assert on_record <= REQUESTS.keys()


def test_the_requests_reach_every_verdict():
    verdicts = {_answer(name).verdict for name in REQUESTS}
    assert verdicts == {"fits", "tight", "does_not_fit", "unknown"}


def test_the_requests_cover_methods_precisions_and_optimizers():
    answered = [_answer(name).request for name in REQUESTS]
    assert {each["method"]["name"] for each in answered} == {"full", "lora"}
    assert len({each["precision"] for each in answered}) >= 5
    assert len({each["optimizer"]["name"] for each in answered}) >= 5
    assert any(each["quantization"] for each in answered)
