"""BOFT: a full rotation made of small blocks."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError
from tests.conformance.counts import counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = ({"name": "boft"}, {"name": "boft", "boft_block_size": 8})


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", ["llama", "qwen2", "opt"])
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_a_block_that_does_not_divide_the_input_is_refused_as_peft_refuses_it():
    method = {"name": "boft", "boft_block_size": 7}
    with pytest.raises(InvalidRequestError, match="divisible"):
        counted_here(method, "llama")
    with pytest.raises(InvalidRequestError, match="divisible"):
        counted_by_peft(method, "llama")
