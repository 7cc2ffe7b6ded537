"""FOAK kernels: where they are refused."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import resolve

MISTRAL = "mistralai/Mistral-7B-v0.1"


@pytest.mark.parametrize(
    "fields",
    [
        {"software": {"version": "5"}},
        {"model": "Qwen/Qwen2-7B", "software": {"version": "4"}},
        {"method": "qlora", "software": {"version": "4"}},
        {"loss": "cut_cross_entropy", "software": {"version": "4"}},
    ],
)
def test_foak_is_refused_where_it_has_no_source(fields):
    request = parse_request({"model": MISTRAL, "kernels": ["foak"], **fields})
    config = find_model(request.model, Access.CATALOGUE).config
    with pytest.raises(UnsupportedCombinationError, match="foak"):
        resolve(request, config, request.model)
