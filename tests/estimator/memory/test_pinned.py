"""What the allocator cannot give back, and the verdict that follows from it."""

from __future__ import annotations

import pytest

from estimator.catalog import Access
from estimator.pipeline import device_of, engine_for
from estimator.request import parse_request
from estimator.service import estimate, model_config

QWEN = "Qwen/Qwen3-0.6B"
RUNS = {
    "full": {"model": "gpt2"},
    "full, checkpointed": {"model": "gpt2", "activation_checkpointing": "full"},
    "a large vocabulary": {"model": QWEN, "activation_checkpointing": "full"},
    "8-bit states": {"model": QWEN, "activation_checkpointing": "full", "optimizer": "adamw_8bit"},
    "qlora": {"model": QWEN, "method": "qlora", "activation_checkpointing": "full"},
    "accumulation": {"model": "gpt2", "gradient_accumulation_steps": 4},
}


def _blocks(run, room=None):
    """Replay a run with so much room for the allocator [bytes]."""
    document = {"micro_batch_size": 2, "seq_len": 512, **run}
    request = parse_request(document)
    model = model_config(request, Access.CATALOGUE)
    engine = engine_for(request, model.config, model.id)
    device = device_of(None, request)
    if room is not None:
        memory = {"memory_bytes": room + device.constants.context.expected}
        device = device_of(None, parse_request({**document, "hardware": memory}))
    return engine.blocks(2, 512, device)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_dies_with_less_than_what_cannot_be_given_back_and_lives_with_it(run):
    """The allocator gives segments back when it runs out; what is in use pins the others."""
    pinned = _blocks(run).pinned
    # What is given back on the way moves later blocks, a little.
    assert _blocks(run, round(pinned * 1.005)).fits
    assert not _blocks(run, round(pinned * 0.99)).fits


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_cannot_be_given_back_does_not_depend_on_the_card(run):
    pinned = _blocks(run).pinned
    assert _blocks(run, round(pinned * 1.005)).pinned == pinned


def test_states_that_are_made_where_the_first_logits_were_keep_their_segments_from_later_ones():
    """The first step of AdamW finds the freed logits; the second step needs others."""
    recipe = {"model": QWEN, "activation_checkpointing": "full"}
    peak = estimate({**recipe, "micro_batch_size": 4, "seq_len": 512}).peak
    context = peak.device_used_bytes.expected - peak.reserved_bytes.expected
    # The dry run allocates 6.953 GiB, and 8.822 GiB lie in segments with something in them.
    pinned, allocated = peak.needed_bytes.expected - context, peak.allocated_bytes.expected
    assert pinned / allocated == pytest.approx(8.822 / 6.953, rel=0.03)


def test_a_card_on_which_the_replay_runs_out_is_not_said_to_fit():
    recipe = {"model": QWEN, "activation_checkpointing": "full"}
    recipe |= {"micro_batch_size": 2, "seq_len": 512}
    pinned = _blocks(recipe).pinned
    context = device_of(None, parse_request(recipe)).constants.context
    small = {"hardware": {"memory_bytes": round(0.99 * pinned) + context.expected}}
    result = estimate({**recipe, **small})
    assert result.verdict == "tight"
    assert result.peak.allocated_bytes.high + context.high < result.capacity.usable_bytes


def test_the_largest_run_that_is_named_fits_when_it_is_asked_for():
    recipe = {"model": QWEN, "activation_checkpointing": "full", "seq_len": 512}
    recipe |= {"hardware": "rtx-4090"}
    limits = estimate(recipe).limits
    for field, value in (
        ("micro_batch_size", limits.max_micro_batch_size),
        ("seq_len", limits.max_seq_len),
    ):
        assert estimate({**recipe, field: value}).verdict == "fits"


def test_the_card_that_is_named_fits_when_it_is_asked_for():
    recipe = {"model": QWEN, "activation_checkpointing": "full", "micro_batch_size": 8}
    card = estimate({**recipe, "hardware": "h100-80gb-sxm"}).limits.smallest_gpu
    assert estimate({**recipe, "hardware": card}).verdict == "fits"
