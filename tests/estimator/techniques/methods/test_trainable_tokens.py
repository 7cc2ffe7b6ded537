"""Trainable tokens: rows of the embedding, alone and beside LoRA."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "trainable_tokens", "num_tokens": 7},
    {"name": "lora", "trainable_token_indices": [3, 50, 9]},
    {"name": "lora", "trainable_token_indices": [3, 3], "target_modules": ["c_attn", "q_proj"]},
)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "trainable_token_indices": [50_021]},
        {"name": "lora", "trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        {"name": "trainable_tokens", "num_tokens": 50_022},
    ],
    ids=str,
)
def test_what_peft_cannot_build_is_refused(method: dict[str, Any]):
    with pytest.raises(InvalidRequestError):
        counted_here(method, "llama")


def test_a_tied_head_with_an_adapter_of_its_own_is_refused():
    method = {
        "name": "lora", "trainable_token_indices": [1], "target_modules": ["q_proj", "lm_head"],
    }  # fmt: skip
    with pytest.raises(UnsupportedCombinationError, match="tied head"):
        counted_here(method, "llama-tied")
