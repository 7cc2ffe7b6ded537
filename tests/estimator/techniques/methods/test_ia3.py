"""IA3: one vector for each targeted layer."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "ia3"},
    {"name": "ia3", "target_modules": "all-linear"},
)


@pytest.mark.parametrize("method", METHODS, ids=("default targets", "every linear layer"))
@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_modules_must_be_named_where_peft_has_no_default():
    with pytest.raises(InvalidRequestError, match="phi3"):
        counted_here("ia3", "phi3")
