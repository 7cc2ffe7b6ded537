"""FourierFT: a sparse spectrum as update."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conformance.counts import counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "fourierft"},
    {"name": "fourierft", "n_frequency": 77},
)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2"])
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)
