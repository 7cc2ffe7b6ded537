"""PEFT's LLaMA-Adapter: counts, and the models that it has none for."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from tests.conformance.counts import counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "adaption_prompt"},
    {"name": "adaption_prompt", "adapter_len": 7, "adapter_layers": 2},
)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", ["llama", "mistral-window", "gpt2"])
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_a_family_that_peft_has_none_for_is_refused_as_peft_refuses_it():
    with pytest.raises(UnsupportedCombinationError, match="qwen2"):
        counted_here("adaption_prompt", "qwen2")
    with pytest.raises(InvalidRequestError, match="PEFT refuses"):
        counted_by_peft("adaption_prompt", "qwen2")


def test_more_layers_than_the_model_has_are_refused_as_peft_refuses_them():
    method = {"name": "adaption_prompt", "adapter_layers": 6}
    with pytest.raises(InvalidRequestError, match="5 layers"):
        counted_here(method, "llama")
    with pytest.raises(InvalidRequestError, match="PEFT refuses"):
        counted_by_peft(method, "llama")


def test_packed_weights_are_refused_by_name():
    with pytest.raises(UnsupportedCombinationError, match="nf4"):
        counted_here("adaption_prompt", "llama", quantization="nf4")
