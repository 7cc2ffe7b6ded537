"""What the planner proposes, and that a proposal is what it says."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.catalog import Access, find_gpu, find_model
from estimator.pipeline import device_of, engine_for, lengths_in
from estimator.request import parse_request
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


# -- the largest that fits ---------------------------------------------------------------------

LLAMA_8B = "meta-llama/Llama-3.1-8B"
FULL: dict[str, Any] = {
    "model": LLAMA_8B,
    "method": "full",
    "activation_checkpointing": "full",
    "hardware": {"gpu": "h100-80gb-sxm"},
}
LORA: dict[str, Any] = {
    "model": LLAMA_8B,
    "method": "lora",
    "activation_checkpointing": "full",
    "hardware": {"gpu": "rtx-4090"},
}


@pytest.mark.parametrize(
    "recipe",
    [
        {**FULL, "seq_len": 512},
        {**LORA, "seq_len": 2048},
        {**FULL, "model": "gpt2", "seq_len": 1024},
    ],
    ids=["full", "lora", "small"],
)
def test_the_largest_that_fits_is_no_less_than_what_was_asked_for_and_fits(recipe):
    result = estimate(recipe)
    assert result.verdict == "fits"
    assert result.limits.max_micro_batch_size >= 1
    assert result.limits.max_seq_len >= result.request["seq_len"]


@pytest.mark.parametrize(
    "recipe",
    [{**FULL, "seq_len": 2048, "micro_batch_size": 8}, {**LORA, "seq_len": 4096}],
    ids=["full", "lora"],
)
def test_the_largest_that_fits_is_said_to_fit_when_it_is_asked_for(recipe):
    """In both recipes what was asked for does not fit, and something smaller does."""
    result = estimate(recipe)
    assert result.verdict != "fits"
    assert result.limits.max_seq_len > 0
    assert estimate({**recipe, "seq_len": result.limits.max_seq_len}).verdict == "fits"
    assert estimate({**recipe, "seq_len": 2 * result.limits.max_seq_len}).verdict != "fits"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seq_len", [1024, 2400, 2500, 4096])
def test_a_size_is_refused_after_one_replay_just_when_its_verdict_is_not_fits(seq_len, packing):
    request = parse_request({**LORA, "seq_len": seq_len, "packing": packing})
    gpu = find_gpu("rtx-4090")
    engine = engine_for(request, find_model(LLAMA_8B, Access.CATALOGUE).config, LLAMA_8B)
    at = (1, seq_len, device_of(gpu, request), lengths_in(request))
    share = engine.refused_share(*at)
    assert (share is None) == (engine.verdict(*at) == "fits")
    assert share is None or 1 <= share <= engine.share(*at)
