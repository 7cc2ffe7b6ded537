"""VB-LoRA: counts against PEFT, and the widths that a vector has to divide."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "vblora", "vector_length": 64, "num_vectors": 33},
    {"name": "vblora", "vector_length": 8, "target_modules": "all-linear", "r": 3, "topk": 4},
    {"name": "vblora", "vector_length": 64, "save_only_topk_weights": True},
)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_a_vector_that_does_not_divide_a_layer_is_refused_as_peft_refuses_it():
    with pytest.raises(InvalidRequestError, match="vector_length 256"):
        counted_here("vblora", "llama")
    with pytest.raises(InvalidRequestError, match="divisible"):
        counted_by_peft("vblora", "llama")


def test_more_vectors_to_mix_than_the_bank_has_are_refused():
    method = {"name": "vblora", "vector_length": 64, "num_vectors": 2, "topk": 3}
    with pytest.raises(InvalidRequestError, match="topk"):
        counted_here(method, "llama")
