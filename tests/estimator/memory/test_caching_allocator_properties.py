"""Laws of the caching allocator that hold for every sequence of requests."""

from __future__ import annotations

import contextlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from estimator.memory.caching_allocator import (
    AllocationEvent,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemory,
    apply,
    replay,
)
from estimator.units import MiB

SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_size_bytes=st.sampled_from([None, 24 * MiB, 64 * MiB]),
    roundup_power2_divisions=st.sampled_from([0, 4]),
)
SIZES = st.one_of(
    st.integers(0, 4096),
    st.integers(1, 3 * MiB),
    st.integers(1, 90 * MiB),
    st.sampled_from([512, 1 * MiB, 1 * MiB + 1, 10 * MiB - 1, 10 * MiB, 43 * MiB]),
)


@st.composite
def traces(draw: st.DrawFn) -> list[AllocationEvent]:
    """Well-formed traces: what is freed was allocated, and no key is used twice."""
    events: list[AllocationEvent] = []
    live: list[int] = []
    for key in range(draw(st.integers(1, 40))):
        action = draw(st.integers(0, 9))
        if action < 5 or not live:
            events.append(AllocationEvent("alloc", key, draw(SIZES), draw(st.integers(0, 1))))
            live.append(key)
        elif action == 9:
            events.append(AllocationEvent("empty_cache"))
        else:
            freed = live.pop(draw(st.integers(0, len(live) - 1)))
            events.append(AllocationEvent("free_requested" if action == 8 else "free", freed))
    return events


def live_keys(trace: list[AllocationEvent]) -> list[int]:
    freed = {event.key for event in trace if event.kind in ("free", "free_requested")}
    return [event.key for event in trace if event.kind == "alloc" and event.key not in freed]


@given(traces(), SETTINGS)
def test_blocks_tile_their_segments_and_nothing_overlaps(
    trace: list[AllocationEvent], settings: AllocatorSettings
) -> None:
    allocator = CachingAllocator(settings=settings)
    for event in trace:
        apply(allocator, event)
        segments = allocator.segments()
        for segment in segments:
            starts = [block.address for block in segment.blocks]
            ends = [block.address + block.size_bytes for block in segment.blocks]
            assert starts == [segment.address, *ends[:-1]]
            assert ends[-1] == segment.address + segment.size_bytes
        for first, second in pairwise(segments):
            assert first.address + first.size_bytes <= second.address


@given(traces(), SETTINGS)
def test_the_counters_are_the_sums_over_the_blocks_and_the_driver_log(
    trace: list[AllocationEvent], settings: AllocatorSettings
) -> None:
    allocator = CachingAllocator(settings=settings)
    for event in trace:
        apply(allocator, event)
        stats = allocator.stats
        blocks = [block for segment in allocator.segments() for block in segment.blocks]
        in_use = [block for block in blocks if block.state == "active_allocated"]
        active = [block for block in blocks if block.state != "inactive"]
        taken = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
        assert stats.reserved_bytes == sum(block.size_bytes for block in blocks)
        assert stats.reserved_bytes == sum(
            taken[event.kind] * event.size_bytes for event in allocator.segment_events
        )
        assert stats.allocated_bytes == sum(block.size_bytes for block in in_use)
        assert stats.active_bytes == sum(block.size_bytes for block in active)
        assert stats.requested_bytes == sum(block.requested_bytes for block in active)
        assert stats.requested_bytes <= stats.active_bytes
        assert stats.allocated_bytes <= stats.active_bytes <= stats.reserved_bytes
        assert stats.peak_reserved_bytes >= stats.peak_allocated_bytes >= stats.allocated_bytes


@given(traces(), SETTINGS)
def test_two_free_neighbours_never_stay_apart(
    trace: list[AllocationEvent], settings: AllocatorSettings
) -> None:
    allocator = CachingAllocator(settings=settings)
    for event in trace:
        apply(allocator, event)
        for segment in allocator.segments():
            states = [block.state for block in segment.blocks]
            assert ("inactive", "inactive") not in list(pairwise(states))


@given(traces(), SETTINGS)
def test_nothing_is_held_after_everything_is_freed_and_released(
    trace: list[AllocationEvent], settings: AllocatorSettings
) -> None:
    allocator = CachingAllocator(settings=settings)
    for event in trace:
        apply(allocator, event)
    for key in live_keys(trace):
        allocator.free(key)
    allocator.empty_cache()
    stats = allocator.stats
    assert (stats.allocated_bytes, stats.active_bytes, stats.requested_bytes) == (0, 0, 0)
    assert (stats.reserved_bytes, stats.num_segments) == (0, 0)
    assert allocator.segments() == ()


@given(traces(), st.booleans())
def test_a_request_is_charged_its_512_byte_blocks_and_at_most_1_mib_more(
    trace: list[AllocationEvent], expandable: bool
) -> None:
    allocator = CachingAllocator(settings=AllocatorSettings(expandable_segments=expandable))
    for event in trace:
        if event.kind != "alloc":
            apply(allocator, event)
            continue
        charged = allocator.malloc(event.key, event.size_bytes, event.stream).charged_bytes
        blocks = (event.size_bytes + 511) // 512 * 512
        slack = 0 if expandable or blocks <= 1 * MiB else 1 * MiB
        assert blocks <= charged <= blocks + slack


@given(traces(), SETTINGS, st.integers(20, 200))
def test_a_capacity_limit_is_never_exceeded_and_a_failure_changes_nothing(
    trace: list[AllocationEvent], settings: AllocatorSettings, capacity_mib: int
) -> None:
    allocator = CachingAllocator(capacity_mib * MiB, settings)
    failed: set[int] = set()
    for event in trace:
        before = allocator.stats.allocated_bytes
        if event.kind == "alloc":
            with contextlib.suppress(OutOfMemory):
                before += allocator.malloc(event.key, event.size_bytes, event.stream).charged_bytes
                assert allocator.stats.allocated_bytes == before
                continue
            failed.add(event.key)
            assert allocator.stats.allocated_bytes == before
        elif event.key not in failed:
            apply(allocator, event)
        assert allocator.stats.peak_reserved_bytes <= capacity_mib * MiB


@given(traces(), SETTINGS)
def test_a_replay_is_deterministic(
    trace: list[AllocationEvent], settings: AllocatorSettings
) -> None:
    assert replay(trace, settings=settings) == replay(trace, settings=settings)


@given(traces(), SETTINGS)
def test_a_capacity_of_the_peak_is_enough(
    trace: list[AllocationEvent], settings: AllocatorSettings
) -> None:
    unlimited = replay(trace, settings=settings).stats
    capped = replay(trace, settings=settings, capacity_bytes=unlimited.peak_reserved_bytes).stats
    assert capped.peak_reserved_bytes == unlimited.peak_reserved_bytes
    assert capped.num_alloc_retries == 0


@given(traces(), SETTINGS, st.integers(0, 39))
def test_an_allocator_that_adopts_what_another_holds_goes_on_as_that_one(
    trace: list[AllocationEvent], settings: AllocatorSettings, parting: int
) -> None:
    one = CachingAllocator(settings=settings)
    for event in trace[:parting]:
        apply(one, event)
    empty = {
        event.key for event in trace[:parting] if event.kind == "alloc" and not event.size_bytes
    }
    held = {block.key for segment in one.segments() for block in segment.blocks}
    other = CachingAllocator(settings=settings)
    # Where an expandable segment begins is not seen from its pieces when its front is unmapped.
    bases = {
        (pool.stream, pool.is_small): block.expandable.base
        for pool in one._pools.values()
        for _, block in pool.unmapped
        if block.expandable is not None
    }
    other.adopt(one.segments(), bases)
    assert other.segments() == one.segments()
    assert other.stats.reserved_bytes == one.stats.reserved_bytes
    assert other.stats.active_bytes == one.stats.active_bytes
    before = len(one.segment_events)
    for event in trace[parting:]:
        apply(one, event)
        if event.kind in ("alloc", "empty_cache") or event.key in held or event.key not in empty:
            apply(other, event)
    exchanges = [(each.kind, each.size_bytes) for each in one.segment_events[before:]]
    assert [(each.kind, each.size_bytes) for each in other.segment_events] == exchanges
