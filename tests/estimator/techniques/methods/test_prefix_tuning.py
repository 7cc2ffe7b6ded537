"""Prefix tuning: keys and values before those of the text."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.pipeline import answer
from estimator.request import parse_request
from tests.conformance.cases import MODELS
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "prefix_tuning"},
    {"name": "prefix_tuning", "prefix_projection": True},
    {"name": "prefix_tuning", "prefix_projection": True, "encoder_hidden_size": 77},
)


@pytest.mark.parametrize("method", METHODS, ids=("plain", "projected", "another width"))
@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_checkpointing_is_refused_as_peft_refuses_it():
    with pytest.raises(UnsupportedCombinationError, match="cache"):
        counted_here("prefix_tuning", "llama", activation_checkpointing="full")


@pytest.mark.parametrize("model", ["falcon", "bloom", "gemma3"])
def test_a_model_whose_cache_was_not_looked_at_is_refused(model: str):
    with pytest.raises(UnsupportedCombinationError, match="prompt_tuning"):
        counted_here("prefix_tuning", model)


def test_a_prefix_takes_the_mask_and_the_kernel_that_goes_with_it():
    config = MODELS["llama"]
    document = {"model": {"config": config}, "method": "prefix_tuning", "seq_len": 1000}
    found = answer(parse_request(document), config, "llama", None)
    rows = {row.name: row for part in found.breakdown for row in part.rows}
    # A mask for each layer, [1, 1, 1000, 1020] in bf16: without a prefix there is none.
    assert rows["attention mask as float"].bytes == 5 * 1000 * 1020 * 2
