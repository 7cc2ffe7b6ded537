"""P-tuning: virtual tokens behind a small network."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHODS = ({"name": "p_tuning"}, {"name": "p_tuning", "encoder_hidden_size": 77})


@pytest.mark.parametrize("method", METHODS, ids=("default width", "another width"))
@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_the_lstm_is_refused_because_cudnn_sizes_its_buffers():
    method = {"name": "p_tuning", "encoder_reparameterization_type": "LSTM"}
    with pytest.raises(UnsupportedCombinationError, match="cuDNN"):
        counted_here(method, "llama")
