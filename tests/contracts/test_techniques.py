"""The page of techniques: every row can be asked for, has a source, and names real cases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import EstimatorError
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.sources import SOURCES
from tests.conformance.cases import cases

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import techniques  # noqa: E402 - a script of the documentation, not a package

ROWS = list(techniques.techniques())
CASES = {case.name for case in cases()}
MODEL = "meta-llama/Llama-3.1-8B"


def test_every_technique_has_a_name_of_its_own():
    names = [row["name"] for row in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_technique_can_be_asked_for_and_is_answered(row: dict[str, Any]):
    document = {"model": MODEL, **json.loads(row["request"])}
    config = find_model(document["model"], Access.CATALOGUE).config
    try:
        resolve(parse_request(document), config, document["model"])
    except EstimatorError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_technique_has_a_known_source_and_a_judge(row: dict[str, Any]):
    assert row["source"] in SOURCES
    assert row["where"]
    assert row["changes"].endswith(".")
    assert set(row.get("cases", [])) <= CASES
    assert row.get("cases") or row.get("judge")
