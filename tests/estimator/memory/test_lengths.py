"""Batches of different lengths: what the allocator holds after them, and what the run needs."""

from __future__ import annotations

from random import Random
from statistics import mean, median

import pytest

from estimator.catalog import Access
from estimator.memory.lengths import (
    ALIKE,
    FIRST,
    ORDERS,
    UNKNOWN,
    Lengths,
    history,
    lengths_of,
    orders,
)
from estimator.pipeline import device_of, engine_for
from estimator.request import parse_request
from estimator.service import estimate, model_config, requested_gpu

LENGTHS = (40, 55, 61, 90, 130, 160, 210, 300, 460, 512)
RECIPES = {
    "full": {"model": "gpt2"},
    "full, checkpointed": {"model": "gpt2", "activation_checkpointing": "full"},
    "lora": {"model": "gpt2", "method": "lora"},
    "qlora": {"model": "Qwen/Qwen3-0.6B", "method": "qlora", "activation_checkpointing": "full"},
    "accumulation": {"model": "gpt2", "gradient_accumulation_steps": 4},
}


def _question(recipe):
    request = parse_request({"micro_batch_size": 2, "seq_len": 512, "padding": True, **recipe})
    model = model_config(request, Access.CATALOGUE)
    engine = engine_for(request, model.config, model.id)
    return engine, device_of(requested_gpu(request), request)


def _batches(rows, number, seed):
    """Return batches of samples that are drawn one by one, the longest at the end."""
    random = Random(seed)
    return [max(random.choices(LENGTHS, k=rows)) for _ in range(number)] + [max(LENGTHS)]


def _records(batches):
    return [each for i, each in enumerate(batches) if each > max(batches[:i], default=0)]


def _whole_orders(engine, device, number=9):
    """Return what is held after sequences of batches that are replayed one by one [bytes]."""
    return sorted(
        engine.blocks_under(2, 512, device, earlier=tuple(_batches(2, 30, seed)[:-1])).reserved
        for seed in range(number)
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_batches_that_count_stand_for_the_whole_sequence(recipe):
    engine, device = _question(recipe)
    held = engine.reserved_range(2, 512, device, Lengths(LENGTHS))
    whole = _whole_orders(engine, device)
    assert held.expected == pytest.approx(median(whole), rel=0.25)
    assert held.low == pytest.approx(whole[0], rel=0.1)
    assert held.high == pytest.approx(whole[-1], rel=0.25)


def test_later_batches_that_are_longer_than_all_before_are_those_of_batches_drawn_one_by_one():
    random = Random(3)
    lengths = range(1, 1001)
    drawn = [history(lengths, 2, 1000, iter(random.random, None)) for _ in range(1000)]
    counted = [
        [max(random.choices(lengths, k=2)) for _ in range(1500)] + [1000] for _ in range(300)
    ]
    later = [each[FIRST:] for each in drawn], [_records(each)[_early(each) :] for each in counted]
    assert mean(map(len, later[0])) == pytest.approx(mean(map(len, later[1])), rel=0.1)


def _early(batches):
    return len(_records(batches[:FIRST]))


def test_the_first_batches_of_the_orders_lie_evenly_over_the_distribution():
    first = [each[0] for each in orders(range(1, 50 * ORDERS + 1), 1, 50 * ORDERS)]
    assert sorted((each - 1) // 50 for each in first) == list(range(ORDERS))


def test_the_orders_are_the_same_every_time():
    assert orders(LENGTHS, 2, 512) == orders(tuple(reversed(LENGTHS)), 2, 512)


def test_samples_of_one_length_are_one_batch():
    assert {length for order in orders((512, 512), 4, 512) for length in order} == {512}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_card_that_is_said_to_do_holds_whole_sequences(recipe):
    engine, device = _question({**recipe, "hardware": {"memory_bytes": 2**50}})
    needed = engine.needed(2, 512, device, Lengths(LENGTHS))
    engine, device = _question({**recipe, "hardware": {"memory_bytes": needed.high}})
    # A run that does not fit is replayed as if it had room, and then holds more than there is.
    room = needed.high - device.constants.context.expected
    assert _whole_orders(engine, device)[-1] <= room


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_card_that_is_said_to_do_holds_whole_sequences_of_lengths_that_are_not_known(recipe):
    engine, device = _question(recipe)
    promised = engine.needed(2, 512, device, UNKNOWN).high - device.constants.context.high
    needed = [
        engine.blocks_under(2, 512, device, earlier=tuple(_batches(2, 30, seed)[:-1])).pinned
        for seed in range(9)
    ]
    assert max(needed) <= promised


def test_lengths_that_are_not_known_need_more_at_the_high_end_alone():
    engine, device = _question({"model": "gpt2", "method": "lora"})
    known, unknown = (engine.needed(2, 512, device, each) for each in (ALIKE, UNKNOWN))
    assert (known.low, known.expected) == (unknown.low, unknown.expected)
    assert known.high < unknown.high


@pytest.mark.parametrize(
    ("said", "differ"),
    [
        ({}, True),
        ({"packing": True}, False),
        ({"sample_lengths": [512]}, False),
        ({"sample_lengths": [512, 600]}, False),
        ({"sample_lengths": [40, 512]}, False),
    ],
)
def test_only_a_request_that_says_nothing_of_lengths_is_told_that_they_differ(said, differ):
    found = estimate({"model": "meta-llama/Llama-3.2-1B", "method": "lora", "seq_len": 512} | said)
    assert any("of different lengths" in each for each in found.assumptions) is differ


def test_samples_that_are_all_as_long_as_the_batch_say_that_all_batches_are_alike():
    assert lengths_of((512, 700), 512, packing=False) == ALIKE
    assert lengths_of((511, 700), 512, packing=False) == Lengths((511, 700))


def test_samples_of_one_length_are_not_padded():
    asked = {"model": "gpt2", "micro_batch_size": 4, "seq_len": 512}
    assert not parse_request({**asked, "sample_lengths": [512]}).padding
    assert parse_request({**asked, "sample_lengths": [100, 512]}).padding


def test_more_fits_where_all_batches_are_alike():
    asked = {"model": "gpt2", "method": "lora", "seq_len": 512, "hardware": "rtx-4090"}
    alike, other = (estimate({**asked, "sample_lengths": each}).limits for each in ([512], []))
    assert alike.max_micro_batch_size > other.max_micro_batch_size


def test_the_allocated_peak_is_that_of_the_longest_batch_and_more_is_needed():
    plain = {"model": "gpt2", "method": "lora", "micro_batch_size": 4, "seq_len": 512}
    plain |= {"padding": True, "hardware": "rtx-4090"}
    one, other = estimate(plain), estimate({**plain, "sample_lengths": LENGTHS})
    assert one.peak.allocated_bytes == other.peak.allocated_bytes
    assert one.peak.needed_bytes.low == other.peak.needed_bytes.low
    assert one.peak.needed_bytes.expected <= other.peak.needed_bytes.expected


def test_reserved_reaches_from_the_least_to_the_most_that_an_order_holds():
    recipe = {"model": "gpt2", "micro_batch_size": 2, "seq_len": 512, "padding": True}
    engine, device = _question(recipe)
    held = engine.reserved_range(2, 512, device, Lengths(LENGTHS))
    peak = estimate({**recipe, "sample_lengths": LENGTHS}).peak
    assert peak.reserved_bytes.low < held.low < held.expected < held.high
    assert peak.reserved_bytes.expected == held.expected
    assert peak.reserved_bytes.high > held.high
    (told,) = (each for each in _assumptions(recipe) if "random orders" in each)
    assert str(ORDERS) in told


def _assumptions(recipe):
    return estimate({**recipe, "sample_lengths": LENGTHS}).assumptions


def test_the_expected_value_is_the_middle_order():
    engine, device = _question({"model": "gpt2"})
    drawn = orders(LENGTHS, 2, 512)
    found = [engine.blocks_under(2, 512, device, earlier=each[:-1]).reserved for each in drawn]
    assert engine.reserved_range(2, 512, device, Lengths(LENGTHS)).expected == median(found)
