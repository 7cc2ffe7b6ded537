"""LoHa: two low-rank products, multiplied elementwise."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from tests.conformance.counts import counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "loha"},
    {"name": "loha", "r": 3, "target_modules": "all-linear"},
)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", ["llama", "qwen2", "opt"])
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_the_conv1d_of_gpt2_is_refused_as_peft_refuses_it():
    with pytest.raises(InvalidRequestError, match="Conv1D"):
        counted_here("loha", "gpt2")
    with pytest.raises(InvalidRequestError, match="PEFT refuses"):
        counted_by_peft("loha", "gpt2")


def test_packed_weights_are_refused_for_their_shape_is_not_that_of_the_update():
    with pytest.raises(UnsupportedCombinationError, match="nf4"):
        counted_here("loha", "llama", quantization="nf4")
