"""What the planner proposes, and that a proposal is what it says."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.service import estimate

# Llama-3.1-8B has 8,030,261,248 parameters (its model card), 218,112,000 of them in each layer.
LEFT_OUT = 8_030_261_248 - 2 * 218_112_000

PARTIAL: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-8B",
    "method": {"name": "partial", "last_layers": 2, "freeze_others": False},
    "hardware": {"gpu": "rtx-4090"},
}


def test_freezing_what_the_optimizer_leaves_out_is_proposed():
    """It costs nothing, and saves at least the bf16 gradients that nobody clears."""
    (freezing,) = (
        each
        for each in estimate(PARTIAL).suggestions
        if each.change.get("method", {}).get("freeze_others")
    )
    assert freezing.cost == "none"
    assert freezing.saves_bytes > 2 * LEFT_OUT


@pytest.mark.parametrize(
    "recipe",
    [
        PARTIAL,
        {**PARTIAL, "method": "full"},
        {**PARTIAL, "method": "lora", "attention": "eager", "micro_batch_size": 4},
    ],
)
def test_a_proposal_saves_what_it_says_and_gets_the_verdict_it_says(recipe):
    before = estimate(recipe)
    assert before.suggestions
    for each in before.suggestions:
        after = estimate({**recipe, **each.change})
        saved = before.peak.allocated_bytes.expected - after.peak.allocated_bytes.expected
        # Of the tensors alone, without a replay: blocks differ by a few segments.
        assert each.saves_bytes == pytest.approx(saved, rel=0.01)
        assert after.verdict == each.verdict_after
