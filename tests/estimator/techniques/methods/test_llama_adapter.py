"""LLaMA-Adapter in Lit-GPT: what its scripts print, and where it is refused."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import resolve


def _run(model: str, method: object, software: str = "litgpt"):
    request = parse_request({"model": model, "method": method, "software": software})
    return resolve(request, find_model(model, Access.CATALOGUE).config, model)


# Lit-GPT, tutorials/resource-tables.md at 0f021f3a, "Trainable parameters".
PRINTED = [
    ("stabilityai/stablelm-base-alpha-3b", "llama_adapter", 573_888),
    ("meta-llama/Llama-2-7b-hf", "llama_adapter", 1_229_760),
    ("stabilityai/stablelm-base-alpha-3b", "llama_adapter_v2", 2_125_248),
    ("meta-llama/Llama-2-7b-hf", "llama_adapter_v2", 4_279_744),
]


@pytest.mark.parametrize(("model", "method", "trainable"), PRINTED)
def test_trained_parameters_are_those_that_the_script_printed(model, method, trainable):
    assert _run(model, method).spec.trainable_parameters() == trainable


def test_it_is_refused_outside_litgpt_with_what_to_use():
    with pytest.raises(UnsupportedCombinationError, match="adaption_prompt"):
        _run("meta-llama/Llama-2-7b-hf", "llama_adapter", "transformers")


def test_a_first_layer_beyond_the_model_is_refused():
    method = {"name": "llama_adapter", "adapter_start_layer": 32}
    with pytest.raises(InvalidRequestError, match="32 is beyond the 32 layers"):
        _run("meta-llama/Llama-2-7b-hf", method)


def test_nothing_below_the_first_prompt_wants_a_gradient():
    spec = _run("meta-llama/Llama-2-7b-hf", "llama_adapter").spec
    assert [spec.kinds[each].name for each in spec.pattern[:4]] == [
        "layer", "layer", "first layer with a prompt", "layer with a prompt",
    ]  # fmt: skip
