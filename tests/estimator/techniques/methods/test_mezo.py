"""MeZO: no gradients and no states; as much memory as inference, as the paper says."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.service import estimate

OPT_1_3B: dict[str, Any] = {"model": "facebook/opt-1.3b", "seq_len": 512}


def test_everything_is_trained_and_nothing_is_kept_for_it():
    result = estimate({**OPT_1_3B, "method": "mezo"})
    assert result.parameters.trainable == result.parameters.total
    components = {each.component for each in result.breakdown}
    assert not components & {"gradients"}
    assert {each.moment for each in result.timeline} >= {"loss forward", "optimizer step"}
    assert not any("backward:" in each.moment for each in result.timeline)


def test_full_training_with_adam_needs_several_times_more():
    # malladi2023, abstract: up to 12 times less memory than fine-tuning with backpropagation.
    mezo, full = (
        estimate({**OPT_1_3B, "method": method}).peak.allocated_bytes.expected
        for method in ("mezo", "full")
    )
    assert 3 < full / mezo < 12


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": "full"},
        {"precision": "master_bf16"},
    ],
)
def test_what_presumes_gradients_is_refused(change):
    with pytest.raises(UnsupportedCombinationError, match="no backward pass"):
        estimate({**OPT_1_3B, "method": "mezo", **change})
