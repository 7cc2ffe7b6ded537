"""The model of the caching allocator against numbers that PyTorch, or a GPU, printed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from estimator.errors import InvalidRequestError
from estimator.memory.caching_allocator import (
    AllocationEvent,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemory,
    next_power2_division,
    replay,
    round_size,
    segment_size,
)
from estimator.units import GiB, KiB, MiB

EXPANDABLE = AllocatorSettings(expandable_segments=True)


@pytest.mark.parametrize(
    ("size_bytes", "divisions", "rounded"),
    [
        # pytorch PR 74213, description: 1200 with 4 divisions lies between 1024, 1280, 1536, 1792.
        (1200, 4, 1280),
        # pytorch test/test_cuda.py::TestCuda::test_allocator_settings: 21 Mi floats, the next
        # quarter between 64 and 128 MiB.
        (84 * MiB, 4, 96 * MiB),
        # pytorch issue 161139: 514 MiB becomes 768 MiB with two divisions.
        (514 * MiB, 2, 768 * MiB),
    ],
)
def test_sizes_round_up_to_the_next_division_of_a_power_of_two_as_upstream_prints(
    size_bytes: int, divisions: int, rounded: int
) -> None:
    assert next_power2_division(size_bytes, divisions) == rounded


def test_one_division_rounds_to_512_bytes_only() -> None:
    # pytorch issue 161139, "roundup_power2_divisions ignores the value of 1".
    settings = AllocatorSettings(roundup_power2_divisions=1)
    assert round_size(514 * MiB, settings) == 514 * MiB


def test_divisions_can_differ_between_powers_of_two() -> None:
    # c10 AllocatorConfigTest: [64:8,128:2,256:4,512:2,1024:4,>:1]; the first entry holds from the
    # bottom, `>` to the top, and 32 MiB reads 8, 128 MiB 2, 256 MiB 4, 2 GiB 1.
    divisions = (8, 8, 8, 8, 8, 8, 8, 2, 4, 2, 4, 1, 1, 1, 1, 1)
    settings = AllocatorSettings(roundup_power2_divisions=divisions)
    sizes = (32 * MiB, 64 * MiB, 128 * MiB, 256 * MiB, 512 * MiB, 1 * GiB, 2 * GiB, 4 * GiB)
    assert [settings.divisions(size) for size in sizes] == [8, 8, 2, 4, 2, 4, 1, 1]


def test_a_kilobyte_of_floats_is_1024_active_bytes() -> None:
    # pytorch test/test_cuda.py::TestCuda::test_memory_stats: randn(256) activates 1 kB.
    allocator = CachingAllocator()
    allocator.malloc("tmp", 256 * 4)
    assert allocator.stats.active_bytes == 1024
    allocator.free("tmp")
    allocator.empty_cache()
    assert (allocator.stats.active_bytes, allocator.stats.reserved_bytes) == (0, 0)


def test_a_third_small_tensor_of_1_mib_needs_a_second_segment() -> None:
    # pytorch test/test_cuda.py::TestMemPool::test_mempool_with_allocator: len(snapshot) 1, 1, 2.
    allocator = CachingAllocator()
    segments = []
    for key in range(3):
        allocator.malloc(key, 1 * MiB)
        segments.append(len(allocator.segments()))
    assert segments == [1, 1, 2]


@pytest.mark.parametrize(
    ("tensor", "size_bytes", "tried"),
    [
        # The message names the segment, not the tensor.
        # InternLM/InternLM issue 55: 172.00 MiB, a 7B mlp weight [11008, 4096] in float32.
        ("mlp weight", 11008 * 4096 * 4, 172 * MiB),
        # jhc13/taggui issue 188: 20.00 MiB, which any tensor between 1 and 10 MiB asks for.
        ("a tensor of 3 MiB", 3 * MiB, 20 * MiB),
    ],
)
def test_the_size_tried_is_what_published_out_of_memory_messages_print(
    tensor: str, size_bytes: int, tried: int
) -> None:
    assert segment_size(round_size(size_bytes)) == tried
    with pytest.raises(OutOfMemory) as caught:
        CachingAllocator(capacity_bytes=10 * MiB).malloc(tensor, size_bytes)
    assert caught.value.tried_bytes == tried


def test_a_tail_of_at_most_1_mib_is_charged_to_the_tensor() -> None:
    # SCIENCE, section 2.2: 43 MiB counts as 44 MiB, and exactly as 43 MiB in expandable segments.
    assert CachingAllocator().malloc("t", 43 * MiB).charged_bytes == 44 * MiB
    assert CachingAllocator(settings=EXPANDABLE).malloc("t", 43 * MiB).charged_bytes == 43 * MiB


def test_a_tail_of_more_than_1_mib_stays_free() -> None:
    assert CachingAllocator().malloc("t", 43 * MiB - 512).charged_bytes == 43 * MiB - 512


def test_tensors_between_1_and_10_mib_share_segments_of_20_mib() -> None:
    # pytorch PR 17120: "Requests between 1-10MB allocate (and split) a 20MB block".
    allocator = CachingAllocator()
    for key in range(3):
        allocator.malloc(key, 9 * MiB)
    assert allocator.stats.reserved_bytes == 40 * MiB
    assert [event.size_bytes for event in allocator.segment_events] == [20 * MiB, 20 * MiB]


def test_an_empty_tensor_allocates_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.malloc("empty", 0) == (0, 0)
    allocator.free("empty")
    assert allocator.segment_events == []


def test_a_forward_pass_reads_as_the_forum_printed_it() -> None:
    """Replay the whole script of discuss.pytorch.org/t/138814, figures in MiB as printed there.

    Conv2d(3, 28, 3), then MaxPool2d(3, stride=2, padding=1) twice, over 512 x 3 x 224 x 224; each
    pooling also writes its int64 indices.
    """
    allocator = CachingAllocator()

    def read() -> tuple[int, int]:
        stats = allocator.stats
        return stats.reserved_bytes // MiB, stats.allocated_bytes // MiB

    def forward(epoch: int) -> None:
        allocator.malloc(("conv", epoch), 512 * 28 * 222 * 222 * 4)
        allocator.malloc(("pool1", epoch), 512 * 28 * 111 * 111 * 4)
        allocator.malloc(("indices1", epoch), 512 * 28 * 111 * 111 * 8)
        allocator.free(("indices1", epoch))
        allocator.free(("conv", epoch))
        allocator.malloc(("pred", epoch), 512 * 28 * 56 * 56 * 4)
        allocator.malloc(("indices2", epoch), 512 * 28 * 56 * 56 * 8)
        allocator.free(("indices2", epoch))
        allocator.free(("pool1", epoch))

    allocator.malloc("conv.weight", 28 * 3 * 3 * 3 * 4)
    allocator.malloc("conv.bias", 28 * 4)
    allocator.malloc(("batch", 1), 512 * 3 * 224 * 224 * 4)
    assert read() == (296, 294)  # before forward 1st
    forward(1)
    assert read() == (5014, 465)  # after forward 1st epoch
    allocator.empty_cache()
    assert read() == (1644, 465)  # after empty_cache 1st epoch
    allocator.malloc(("batch", 2), 512 * 3 * 224 * 224 * 4)
    allocator.free(("batch", 1))
    forward(2)
    allocator.free(("pred", 1))
    assert read() == (5688, 465)  # after forward 2nd epoch


SPLIT_LIMIT = AllocatorSettings(expandable_segments=True, max_split_size_bytes=128 * MiB)


def fenced_cycles(allocator: CachingAllocator) -> Callable[[], tuple[int, int, int, int]]:
    """Run the reproducer of pytorch PR 193400 and issue 123548, one cycle for each call."""
    allocator.malloc("canary", 64 * MiB)
    cycle = 0

    def step() -> tuple[int, int, int, int]:
        nonlocal cycle
        allocator.malloc("A", 91 * MiB)
        allocator.malloc("B", 45 * MiB + 512 * KiB)
        allocator.malloc(("fence", cycle), 2 * MiB)
        allocator.free("A")
        allocator.free("B")
        cycle += 1
        stats = allocator.stats
        return (
            stats.allocated_bytes // MiB,
            stats.reserved_bytes // MiB,
            stats.peak_reserved_bytes // MiB,
            stats.num_alloc_retries,
        )

    return step


def test_a_split_limit_in_expandable_segments_leaks_as_measured_on_a_16_gib_card() -> None:
    # pytorch PR 193400, table "cycle, allocated, reserved" (torch 2.12, RX 9070 XT), in MiB.
    measured = {
        0: (66, 220),
        20: (106, 2_980),
        40: (146, 5_760),
        60: (186, 8_520),
        80: (226, 11_300),
        100: (266, 14_060),
    }
    step = fenced_cycles(CachingAllocator(settings=SPLIT_LIMIT))
    replayed = {cycle: step()[:2] for cycle in range(101)}
    assert {cycle: replayed[cycle] for cycle in measured} == measured


def test_the_ladder_unmaps_free_pages_as_measured_when_the_card_is_full() -> None:
    # ROCm/legacy-rocm-build issue 6603, cycle 115 on the same card: allocated 296, reserved 2680,
    # max_reserved 16000 MiB, one retry, no out-of-memory error.
    step = fenced_cycles(CachingAllocator(16_000 * MiB, SPLIT_LIMIT))
    readings = [step() for _ in range(116)]
    assert readings[114][3] == 0
    assert readings[115] == (296, 2_680, 16_000, 1)


@pytest.mark.parametrize(
    "settings", [EXPANDABLE, AllocatorSettings(max_split_size_bytes=128 * MiB), AllocatorSettings()]
)
def test_either_setting_alone_keeps_that_pattern_under_500_mib(settings: AllocatorSettings) -> None:
    # pytorch PR 193400: "Either option on its own ... keeps reserved under 500 MiB".
    step = fenced_cycles(CachingAllocator(settings=settings))
    assert max(step()[1] for _ in range(101)) < 500


def test_expandable_segments_may_be_switched_while_a_limit_holds() -> None:
    # pytorch test/test_cuda.py::test_max_split_expandable, step by step, 120 MiB allowed.
    def settings(*, expandable: bool) -> AllocatorSettings:
        return AllocatorSettings(
            expandable_segments=expandable, max_split_size_bytes=40 * MiB, memory_fraction=0.5
        )

    allocator = CachingAllocator(240 * MiB, settings(expandable=False))
    allocator.malloc("a", 40 * MiB)
    allocator.change_settings(settings(expandable=True))
    allocator.malloc("b", 40 * MiB)
    allocator.change_settings(settings(expandable=False))
    allocator.malloc("c", 40 * MiB)
    with pytest.raises(OutOfMemory):
        allocator.malloc("d", 40 * MiB)
    for key in "abc":
        allocator.free(key)
    allocator.malloc("e", 120 * MiB)
    assert allocator.stats.reserved_bytes == 120 * MiB


def test_half_the_card_twice_fits_only_after_the_first_half_is_freed() -> None:
    # pytorch test/test_cuda.py::TestCuda::test_out_of_memory_retry, with a little in use already.
    allocator = CachingAllocator(16 * GiB)
    allocator.malloc("context", 1024)
    allocator.malloc("a", 8 * GiB)
    with pytest.raises(OutOfMemory):
        allocator.malloc("b", 8 * GiB)
    allocator.free("a")
    allocator.malloc("b", 8 * GiB)
    assert allocator.stats.num_alloc_retries == 1


def test_an_oversize_block_is_reused_only_within_the_rounding_limit() -> None:
    # pytorch PR 136174: limit 400 MB; a cached 1024 MB block does not serve 512 MB until
    # max_non_split_rounding allows it.
    def reserved(rounding: int) -> int:
        settings = AllocatorSettings(
            max_split_size_bytes=400 * MiB, max_non_split_rounding_bytes=rounding
        )
        allocator = CachingAllocator(settings=settings)
        allocator.malloc("first", 1024 * MiB)
        allocator.free("first")
        allocator.malloc("second", 512 * MiB)
        return allocator.stats.reserved_bytes

    assert reserved(20 * MiB) == 1536 * MiB
    assert reserved(600 * MiB) == 1024 * MiB


def test_oversize_blocks_are_released_before_the_rest_of_the_cache() -> None:
    settings = AllocatorSettings(max_split_size_bytes=100 * MiB)
    allocator = CachingAllocator(400 * MiB, settings)
    for key, size in (("large", 350), ("small", 40)):
        allocator.malloc(key, size * MiB)
        allocator.free(key)
    allocator.malloc("next", 320 * MiB)
    assert [event.kind for event in allocator.segment_events] == [
        "segment_alloc", "segment_alloc", "segment_free", "segment_alloc",
    ]  # fmt: skip
    assert allocator.stats.num_alloc_retries == 0


def test_memory_never_crosses_streams() -> None:
    allocator = CachingAllocator()
    allocator.malloc("compute", 50 * MiB, stream=0)
    allocator.free("compute")
    allocator.malloc("communication", 50 * MiB, stream=7)
    assert allocator.stats.reserved_bytes == 100 * MiB
    allocator.malloc("again", 50 * MiB, stream=0)
    assert allocator.stats.reserved_bytes == 100 * MiB


def test_a_block_that_another_stream_reads_is_active_but_not_allocated() -> None:
    allocator = CachingAllocator()
    allocator.malloc("t", 50 * MiB)
    allocator.request_free("t")
    assert (allocator.stats.allocated_bytes, allocator.stats.active_bytes) == (0, 50 * MiB)
    allocator.malloc("next", 50 * MiB)
    assert allocator.stats.reserved_bytes == 100 * MiB
    allocator.complete_free("t")
    assert allocator.stats.active_bytes == 50 * MiB


def test_the_ladder_waits_for_other_streams_before_it_gives_up() -> None:
    allocator = CachingAllocator(100 * MiB)
    allocator.malloc("t", 60 * MiB)
    allocator.request_free("t")
    allocator.malloc("next", 60 * MiB)
    assert allocator.stats.reserved_bytes == 60 * MiB
    allocator.complete_free("t")  # the ladder was faster


def test_the_small_and_the_large_pool_grow_by_pages_of_their_own_size() -> None:
    # SCIENCE, section 2.1: pages of 2 MiB (small pool) and 20 MiB (large pool).
    allocator = CachingAllocator(settings=EXPANDABLE)
    allocator.malloc("small", 1)
    allocator.malloc("large", 21 * MiB)
    assert [(event.kind, event.size_bytes) for event in allocator.segment_events] == [
        ("segment_map", 2 * MiB),
        ("segment_map", 40 * MiB),
    ]


def test_the_end_that_can_still_grow_is_used_last() -> None:
    # pytorch DeviceCachingAllocator::get_free_block: a block before unmapped room counts with it,
    # so the hole of 30 MiB is a better fit for 5 MiB than the 8 MiB at the end.
    allocator = CachingAllocator(settings=EXPANDABLE)
    hole = allocator.malloc("hole", 30 * MiB)
    allocator.malloc("fence", 2 * MiB)
    allocator.malloc("end", 8 * MiB)
    allocator.free("hole")
    allocator.free("end")
    assert allocator.malloc("t", 5 * MiB).address == hole.address


def test_unmapped_pages_come_back_at_the_front() -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    front = allocator.malloc("front", 40 * MiB)
    allocator.malloc("fence", 20 * MiB)
    allocator.free("front")
    allocator.empty_cache()
    assert allocator.stats.reserved_bytes == 20 * MiB
    assert allocator.malloc("again", 40 * MiB).address == front.address


def test_the_error_carries_what_torch_prints() -> None:
    allocator = CachingAllocator(100 * MiB, AllocatorSettings(memory_fraction=0.5))
    allocator.malloc("t", 43 * MiB)
    with pytest.raises(OutOfMemory, match=r"0\.04 GiB is allocated") as caught:
        allocator.malloc("u", 15 * MiB)
    error = caught.value
    assert error.tried_bytes == 16 * MiB
    assert (error.total_bytes, error.allowed_bytes) == (100 * MiB, 50 * MiB)
    assert (error.allocated_bytes, error.reserved_bytes) == (44 * MiB, 44 * MiB)
    assert error.free_bytes == 56 * MiB


def test_peaks_can_be_started_again() -> None:
    allocator = CachingAllocator()
    allocator.malloc("t", 50 * MiB)
    allocator.free("t")
    allocator.reset_peaks()
    assert allocator.stats.peak_allocated_bytes == 0
    assert allocator.stats.peak_reserved_bytes == 50 * MiB


def test_a_trace_is_replayed_in_its_order() -> None:
    trace = [
        AllocationEvent("alloc", 1, 50 * MiB),
        AllocationEvent("free_requested", 1),
        AllocationEvent("free_completed", 1),
        AllocationEvent("alloc", 2, 30 * MiB),
        AllocationEvent("free", 2),
        AllocationEvent("empty_cache"),
    ]
    result = replay(trace)
    assert result.stats.peak_reserved_bytes == 50 * MiB
    assert [event.kind for event in result.segment_events] == ["segment_alloc", "segment_free"]
    assert result.segments == ()


def test_broken_traces_are_refused() -> None:
    allocator = CachingAllocator()
    allocator.malloc(1, 1)
    with pytest.raises(ValueError, match="still allocated"):
        allocator.malloc(1, 1)
    with pytest.raises(ValueError, match="is not allocated"):
        allocator.free(2)
    with pytest.raises(ValueError, match="does not wait"):
        allocator.complete_free(1)
    with pytest.raises(ValueError, match="-1 bytes"):
        allocator.malloc(3, -1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_split_size_bytes", 20 * MiB),
        ("large_segment_bytes", 5 * MiB),
        ("roundup_power2_divisions", 3),
        ("roundup_power2_divisions", (1, 2)),
        ("memory_fraction", 1.5),
    ],
)
def test_settings_that_upstream_refuses_are_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        AllocatorSettings(**{field: value})  # type: ignore[arg-type]


def test_a_fraction_of_an_unknown_capacity_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="capacity_bytes"):
        CachingAllocator(settings=AllocatorSettings(memory_fraction=0.5))


# -- many calls at once ------------------------------------------------------------------------


def test_many_calls_tell_the_most_that_was_handed_out_and_what_was_asked_for_then() -> None:
    # 43 MiB alone are charged 44, and 10 MiB behind them 10.
    allocator = CachingAllocator()
    calls = (("a", 43 * MiB), ("b", 10 * MiB), ("a", None), ("c", 2 * MiB), ("b", None))
    assert allocator.serve(calls) == (54 * MiB, 53 * MiB)
    assert allocator.serve((("c", None),)) == (0, 0)
    assert allocator.stats.peak_allocated_bytes == 54 * MiB


def test_calls_before_the_one_that_fails_are_counted() -> None:
    allocator = CachingAllocator(100 * MiB)
    allocator.malloc("read elsewhere", 30 * MiB)
    allocator.request_free("read elsewhere")
    calls = (("a", 44 * MiB), ("b", 20 * MiB), ("b", None), ("c", 90 * MiB))
    with pytest.raises(OutOfMemory):
        allocator.serve(calls)
    stats = allocator.stats
    # The last call released all that it could before it gave up.
    assert (stats.allocated_bytes, stats.requested_bytes) == (44 * MiB, 44 * MiB)
    assert (stats.reserved_bytes, stats.active_bytes) == (44 * MiB, 44 * MiB)
    assert stats.peak_active_bytes == 94 * MiB
    with pytest.raises(ValueError, match="not allocated"):
        allocator.serve((("d", 2 * MiB), ("nobody", None)))
    assert allocator.stats.requested_bytes == 46 * MiB


def test_pages_that_come_back_hold_nothing_of_what_was_in_them() -> None:
    allocator = CachingAllocator(settings=EXPANDABLE)
    allocator.malloc("kept", 40 * MiB)
    for _ in range(2):
        allocator.serve((("a", 40 * MiB), ("a", None)))
        allocator.empty_cache()
        assert allocator.stats.requested_bytes == 40 * MiB
