"""Laws that hold for every request."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.eager.size import powers
from estimator.errors import CannotEstimateError, InvalidConfigError, InvalidRequestError
from estimator.pipeline import engine_for
from estimator.render.document import to_json
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.result import Range, Result
from estimator.service import estimate
from tests.properties.strategies import SETTINGS, combinations, configs, documents

# A framework's own code asks for fields of the configuration that transformers fills in.
REFUSALS = (CannotEstimateError, InvalidConfigError, InvalidRequestError)

# Requests of the engine's basis, and combinations of every technique that there is.
ANY = documents() | combinations()


def answer(document: dict[str, Any]) -> Result | None:
    """Return the result, None where the combination is refused by name."""
    try:
        return estimate(document)
    except REFUSALS:
        return None


def test_most_combinations_are_answered():
    """Laws about requests that are all refused would hold for nothing."""
    answered = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(combinations())
    def draw(document: dict[str, Any]) -> None:
        answered.append(resolved(document))

    draw()
    assert sum(answered) > len(answered) / 3


def resolved(document: dict[str, Any]) -> bool:
    """Whether the request has an answer, without working it out."""
    try:
        resolve(parse_request(document), document["model"]["config"], "drawn")
    except REFUSALS:
        return False
    return True


def ordered(each: Range) -> bool:
    return 0 <= each.low <= each.expected <= each.high


@settings(**SETTINGS)
@given(ANY, st.floats(0.5, 0.9999), st.floats(0.5, 0.9999))
def test_more_confidence_never_narrows_a_range_and_never_makes_a_run_fit(document, one, other):
    less, more = sorted((one, other))
    # A card on the edge of what the less confident answer says.
    first = answer({**document, "confidence": less})
    if first is None:
        return
    hardware = {**document.get("hardware", {}), "memory_bytes": first.peak.needed_bytes.high}
    sure = answer({**document, "confidence": more, "hardware": hardware})
    assert sure is not None
    for name in ("allocated_bytes", "reserved_bytes", "device_used_bytes", "needed_bytes"):
        narrow, wide = getattr(first.peak, name), getattr(sure.peak, name)
        assert wide.low <= narrow.low <= narrow.high <= wide.high
    widened = sure.peak.needed_bytes.high > first.peak.needed_bytes.high
    assert sure.verdict == ("tight" if widened else "fits")


@settings(**SETTINGS)
@given(ANY)
def test_rows_sum_to_the_allocated_peak_and_ranges_are_ordered(document):
    result = answer(document)
    if result is None:
        return
    peak = result.peak
    assert sum(part.bytes for part in result.breakdown) == peak.allocated_bytes.expected
    for part in result.breakdown:
        assert part.bytes == sum(row.bytes for row in part.rows)
    outside = sum(row.bytes for row in result.outside)
    assert outside == peak.device_used_bytes.expected - peak.allocated_bytes.expected
    for each in (
        peak.allocated_bytes,
        peak.reserved_bytes,
        peak.device_used_bytes,
        peak.needed_bytes,
    ):
        assert ordered(each)


@settings(**SETTINGS)
@given(ANY)
def test_the_timeline_reaches_the_peak_and_nowhere_exceeds_it(document):
    result = answer(document)
    if result is None:
        return
    highest = max(result.timeline, key=lambda moment: moment.bytes)
    assert highest.bytes == result.peak.allocated_bytes.expected
    for moment in result.timeline:
        assert moment.bytes == sum(moment.components.values())


@settings(**SETTINGS)
@given(ANY, st.sampled_from(["micro_batch_size", "seq_len"]), st.integers(1, 500))
def test_a_larger_micro_batch_or_length_never_needs_less(document, field, more):
    before, after = answer(document), answer({**document, field: document[field] + more})
    if before is None or after is None:
        return
    # Not `allocated`: which free block a tensor finds depends on the others, and may be larger in
    # the smaller run. The same holds for what cannot be given back, which the others contain.
    assert after.peak.needed_bytes.low >= before.peak.needed_bytes.low


@settings(**SETTINGS)
@given(ANY)
def test_the_same_request_gives_the_same_document_to_the_byte(document):
    first, second = answer(document), answer(document)
    if first is not None and second is not None:
        assert to_json(first) == to_json(second)


@settings(**SETTINGS)
@given(ANY)
def test_what_is_alive_at_a_moment_sums_to_the_moment(document):
    request = parse_request(document)
    b, s = request.micro_batch_size, request.seq_len
    try:
        step = engine_for(request, document["model"]["config"], "drawn").step(b, s)
    except REFUSALS:
        return
    for moment in step.moments:
        assert moment.alive.polynomial() == moment.total
        assert all(entry.count > 0 for entry in moment.alive.entries)
        assert moment.bytes_at(powers(b, s)) > 0


@settings(max_examples=10, deadline=None)
@given(ANY)
def test_the_waterfall_starts_naive_and_ends_at_what_is_needed(document):
    result = answer({**document, "waterfall": True})
    if result is None:
        return
    steps = result.waterfall
    assert steps[-1].needed_bytes == result.peak.needed_bytes.expected
    for before, after in itertools.pairwise(steps):
        assert before.needed_bytes - after.saves_bytes == after.needed_bytes


@settings(max_examples=8, deadline=None)
@given(documents())
def test_the_largest_run_that_fits_fits_and_a_larger_one_does_not(document):
    document["hardware"] = {"gpu": "rtx-4090"}
    result = answer(document)
    if result is None:
        return
    for field, largest in (
        ("micro_batch_size", result.limits.max_micro_batch_size),
        ("seq_len", result.limits.max_seq_len),
    ):
        assert largest is not None
        if 0 < largest < 60_000:
            # One step more may still do, because another order of blocks fits better.
            more = largest // 4 + 1
            at, beyond = (answer({**document, field: each}) for each in (largest, largest + more))
            assert at is not None
            assert beyond is not None
            assert at.verdict == "fits"
            assert beyond.verdict != "fits"


@settings(**SETTINGS)
@given(configs(), st.sampled_from(["sgd", "adamw_torch", "adafactor"]))
def test_freezing_the_model_never_needs_more_for_states(config, optimizer):
    full = answer({"model": {"config": config}, "optimizer": optimizer})
    lora = answer(
        {"model": {"config": config}, "optimizer": optimizer, "method": {"name": "lora", "r": 1}}
    )
    assert full is not None
    assert lora is not None
    assert lora.parameters.trainable < full.parameters.trainable
    assert lora.parameters.total > full.parameters.total
