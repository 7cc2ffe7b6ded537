"""LN tuning: trained copies of the norms."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from tests.conformance.counts import THREE, counted_by_peft, counted_here

FIRST: dict[str, Any] = {"name": "ln_tuning", "target_modules": ["layers.0.input_layernorm"]}


@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str):
    assert counted_here("ln_tuning", model) == counted_by_peft("ln_tuning", model)


def test_a_norm_of_one_layer_can_be_named():
    assert counted_here(FIRST, "llama") == counted_by_peft(FIRST, "llama")


def test_other_modules_than_norms_are_refused():
    with pytest.raises(UnsupportedCombinationError, match="norms only"):
        counted_here({"name": "ln_tuning", "target_modules": ["q_proj"]}, "llama")


def test_a_name_that_no_norm_has_is_refused():
    with pytest.raises(InvalidRequestError, match="match no norm"):
        counted_here({"name": "ln_tuning", "target_modules": ["ln_9"]}, "llama")
