"""PyTorch's CUDA caching allocator, block for block, without a GPU.

`torch.cuda.max_memory_allocated()` does not add up tensor sizes: it adds up the blocks that this
allocator hands out. `max_memory_reserved()` adds up the segments that it holds. Both follow from
the order of the requests alone, so a trace of allocations, replayed here, gives both.

What one request of n bytes is charged (`allocated`), with b = n rounded up to 512 bytes:

- nothing is allocated for n = 0;
- with expandable segments: exactly b;
- b <= 1 MiB (small pool): exactly b, because a block of the small pool is always split;
- otherwise (large pool), with s = the size of the block that serves it: s if s - b <= 1 MiB, as
  a tail of at most 1 MiB is not split off, else b. The block is the smallest free one of the
  stream with s >= b; if there is none, a new segment, and then s = 20 MiB for b < 10 MiB, else b
  rounded up to 2 MiB. So b <= charge <= b + 1 MiB, and a fresh tensor of 43 MiB is charged 44 MiB;
- with `max_split_size`: a request of at least that size is never split, and is charged s.

`roundup_power2_divisions`, where set, replaces b by the next of its steps inside the power of two.

Three counters differ only in when they move: `allocated` falls when a tensor is dropped, `active`
and `requested` when no other stream still reads the block (at once, unless `record_stream` was
used), `reserved` only when a segment or a page goes back to the driver.

Not modelled: `garbage_collection_threshold`, the private pools of CUDA graphs, and the order in
which the driver picks addresses (here they rise; it only breaks ties between free blocks of equal
size). Recordings of GPUs are replayed with the addresses that they have
(`tests/profiler/histories`): every exchange with the driver and the place of every block come out
as recorded.

Source: torch-caching-allocator, DeviceCachingAllocator; `c10/core/AllocatorConfig.h` and
`c10/cuda/CUDAAllocatorConfig.h` as shipped with torch 2.13.0 (commit cf30153c4c13), which add
`large_segment_size` and `max_non_split_rounding_size`.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from estimator.errors import InvalidRequestError
from estimator.units import GiB, MiB, gib, round_up

# c10/core/AllocatorConfig.h at torch 2.13.0: kMinBlockSize, kSmallSize, kSmallBuffer,
# kMinLargeAlloc, kRoundLarge, and the defaults of the two settings.
MIN_BLOCK_BYTES: Final = 512
SMALL_REQUEST_BYTES: Final = 1 * MiB
SMALL_SEGMENT_BYTES: Final = 2 * MiB
MIN_LARGE_REQUEST_BYTES: Final = 10 * MiB
LARGE_ROUNDING_BYTES: Final = 2 * MiB
LARGE_SEGMENT_BYTES: Final = 20 * MiB
MAX_NON_SPLIT_ROUNDING_BYTES: Final = 20 * MiB

# roundup_power2_divisions has one entry for each power of two from 1 MiB to 32 GiB and above:
# c10/core/AllocatorConfig.cpp::roundup_power2_divisions.
POWER2_INTERVALS: Final = 16
FIRST_POWER2_INTERVAL: Final = 20

# Any start will do; what counts is that later segments lie higher.
FIRST_ADDRESS: Final = 1 << 40
# Room of an expandable segment where no capacity bounds it.
UNBOUNDED_ADDRESS_SPACE: Final = 4096 * GiB

EventKind = Literal["alloc", "free", "free_requested", "free_completed", "empty_cache"]
SegmentEventKind = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]
BlockState = Literal["active_allocated", "active_awaiting_free", "inactive"]
# A key, and the bytes that are asked for under it; None gives its block back.
Call = tuple[Hashable, int | None]


class AllocatorSettings(Struct, frozen=True):
    """The part of `PYTORCH_ALLOC_CONF` that decides about bytes, with upstream's defaults.

    Args:
        expandable_segments: one growing segment for each stream and pool, not many fixed ones.
        max_split_size_bytes: blocks of at least this size are never split; None splits all.
        max_non_split_rounding_bytes: how much larger a never-split block may be than the request.
        roundup_power2_divisions: steps inside each power of two; 0 and 1 round to 512 bytes. One
            number for all sizes, or one for each interval from 1 MiB to 32 GiB and above.
        large_segment_bytes: segment that requests between 1 and 10 MiB share.
        memory_fraction: what `torch.cuda.set_per_process_memory_fraction` was given.

    Raises:
        InvalidRequestError: a value that upstream refuses too.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int = MAX_NON_SPLIT_ROUNDING_BYTES
    roundup_power2_divisions: int | tuple[int, ...] = 0
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    memory_fraction: float | None = None

    def __post_init__(self) -> None:
        split = self.max_split_size_bytes
        if split is not None and split <= self.large_segment_bytes:
            raise InvalidRequestError(
                f"max_split_size_bytes={split} is not above the segment that small requests share "
                f"({self.large_segment_bytes} bytes); raise it or leave it out"
            )
        if self.large_segment_bytes < MIN_LARGE_REQUEST_BYTES or (
            self.large_segment_bytes % LARGE_ROUNDING_BYTES
        ):
            raise InvalidRequestError(
                f"large_segment_bytes={self.large_segment_bytes} must be a multiple of 2 MiB of at "
                "least 10 MiB"
            )
        if len(self._divisions()) != POWER2_INTERVALS:
            raise InvalidRequestError(
                f"roundup_power2_divisions needs one number or {POWER2_INTERVALS}, one for each "
                "power of two from 1 MiB"
            )
        if any(division < 0 or division & (division - 1) for division in self._divisions()):
            raise InvalidRequestError(
                f"roundup_power2_divisions={self.roundup_power2_divisions} must hold 0 or powers "
                "of two"
            )
        if self.memory_fraction is not None and not 0 <= self.memory_fraction <= 1:
            raise InvalidRequestError(f"memory_fraction={self.memory_fraction} is not in 0..1")

    def _divisions(self) -> tuple[int, ...]:
        divisions = self.roundup_power2_divisions
        return (divisions,) * POWER2_INTERVALS if isinstance(divisions, int) else divisions

    def divisions(self, size_bytes: int) -> int:
        """Return the steps inside the power of two that holds `size_bytes`."""
        interval = size_bytes.bit_length() - 1 - FIRST_POWER2_INTERVAL
        return self._divisions()[min(max(interval, 0), POWER2_INTERVALS - 1)]


DEFAULT_SETTINGS: Final = AllocatorSettings()


def next_power2_division(size_bytes: int, divisions: int) -> int:
    """Round up to the next of `divisions` equal steps inside the power of two [bytes].

    Source: torch-caching-allocator, roundup_power2_next_division.

    Example:
        >>> next_power2_division(1200, 4)
        1280
    """
    floor = 1 << (size_bytes.bit_length() - 1)
    if floor == size_bytes:
        return size_bytes
    step = floor // divisions
    return round_up(size_bytes, step) if step else floor * 2


def round_size(size_bytes: int, settings: AllocatorSettings = DEFAULT_SETTINGS) -> int:
    """Bytes of the block that one request asks the pool for.

    Source: torch-caching-allocator, round_size.

    Example:
        >>> round_size(1), round_size(513)
        (512, 1024)
    """
    divisions = settings.divisions(size_bytes) if settings.roundup_power2_divisions else 0
    if divisions > 1 and size_bytes > MIN_BLOCK_BYTES * divisions:
        return next_power2_division(size_bytes, divisions)
    return max(round_up(size_bytes, MIN_BLOCK_BYTES), MIN_BLOCK_BYTES)


def segment_size(block_bytes: int, settings: AllocatorSettings = DEFAULT_SETTINGS) -> int:
    """Bytes of the new segment that serves one rounded request.

    Source: torch-caching-allocator, get_allocation_size.

    Example:
        >>> [segment_size(size) // MiB for size in (512, 2 * MiB, 10 * MiB, 43 * MiB)]
        [2, 20, 10, 44]
    """
    if block_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_LARGE_REQUEST_BYTES:
        return settings.large_segment_bytes
    return round_up(block_bytes, LARGE_ROUNDING_BYTES)


class AllocationEvent(Struct, frozen=True):
    """One line of a trace.

    Args:
        kind: `alloc` and `free`; or `free_requested` and `free_completed` apart, for a block that
            another stream still reads; or `empty_cache`, which has no key.
        key: names the allocation from `alloc` to its `free`; may be used again afterwards.
        size_bytes: what was asked for; read from `alloc` only.
        stream: of the allocation; read from `alloc` only.
    """

    kind: EventKind
    key: int = 0
    size_bytes: int = 0
    stream: int = 0


class Allocation(NamedTuple):
    """The block that one request was given; address 0 and no bytes for an empty request."""

    address: int
    charged_bytes: int


class SegmentEvent(NamedTuple):
    """One exchange with the driver: cudaMalloc, cudaFree, or pages mapped and unmapped."""

    kind: SegmentEventKind
    address: int
    size_bytes: int
    stream: int


class Stats(Struct, frozen=True):
    """The counters of `torch.cuda.memory_stats()` that speak of bytes, now and at their peaks.

    `num_segments` counts cudaMalloc'd segments, as upstream does: an expandable one is not counted.
    `peak_pinned_bytes` is ours: segments with a block in use, which no lack of memory frees. It is
    the least capacity with which the same requests would have been served, but for what a release
    on the way would have placed elsewhere. Of expandable segments all counts.
    """

    allocated_bytes: int
    reserved_bytes: int
    requested_bytes: int
    active_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_requested_bytes: int
    peak_active_bytes: int
    peak_pinned_bytes: int
    num_segments: int
    num_alloc_retries: int


class Block(Struct, frozen=True):
    """A piece of a segment: in use by `key`, waiting for another stream, or free."""

    address: int
    size_bytes: int
    requested_bytes: int
    state: BlockState
    key: Hashable | None


class Segment(Struct, frozen=True):
    """One contiguous range of device memory and the blocks that tile it."""

    address: int
    size_bytes: int
    stream: int
    is_small: bool
    is_expandable: bool
    blocks: tuple[Block, ...]


class OutOfMemory(Exception):  # noqa: N818 - the field's word, as torch prints it
    """The request that did not fit after everything releasable was released.

    Args:
        tried_bytes: the segment that was asked of the driver, which is what torch prints.
        total_bytes: what the driver offers to this process.
        allowed_bytes: the limit that a memory fraction sets, or None.
        allocated_bytes: blocks in use.
        reserved_bytes: segments held.
    """

    def __init__(
        self,
        *,
        tried_bytes: int,
        total_bytes: int,
        allowed_bytes: int | None,
        allocated_bytes: int,
        reserved_bytes: int,
    ) -> None:
        self.tried_bytes = tried_bytes
        self.total_bytes = total_bytes
        self.allowed_bytes = allowed_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        allowed = "" if allowed_bytes is None else f", {gib(allowed_bytes)} of it allowed"
        super().__init__(
            f"out of memory: tried to allocate {gib(tried_bytes)} of {gib(total_bytes)}{allowed}; "
            f"{gib(allocated_bytes)} is allocated and {gib(reserved_bytes - allocated_bytes)} "
            "reserved but unallocated"
        )

    @property
    def free_bytes(self) -> int:
        """What the driver still had to offer."""
        return self.total_bytes - self.reserved_bytes


class _AddressRange(NamedTuple):
    """Reserved addresses of one expandable segment, backed by pages of one size."""

    base: int
    page_bytes: int


class _Block:
    """A node of the linked list that tiles a segment."""

    __slots__ = (
        "address", "expandable", "key", "mapped", "next", "pool", "previous", "requested", "size",
        "state",
    )  # fmt: skip

    def __init__(
        self,
        address: int,
        size: int,
        pool: _Pool,
        expandable: _AddressRange | None = None,
        previous: _Block | None = None,
    ) -> None:
        """Make a free block and link it in behind `previous`, if there is one."""
        self.address = address
        self.size = size
        self.pool = pool
        self.expandable = expandable
        self.requested = 0
        self.key: Hashable | None = None
        self.state: BlockState = "inactive"
        self.mapped = True
        self.previous = previous
        self.next: _Block | None = None
        if previous is not None:
            follower = self.next = previous.next
            if follower is not None:
                follower.previous = self
            previous.next = self

    @property
    def expandable_size(self) -> int:
        """Size that this free block can grow to without moving [bytes]."""
        follower = self.next
        return self.size + (follower.size if follower is not None and not follower.mapped else 0)


class _Pool:
    """Free blocks of one stream, small or large: by size for the best fit, unmapped by address."""

    __slots__ = ("free", "is_small", "stream", "unmapped")

    def __init__(self, stream: int, *, is_small: bool) -> None:
        self.stream = stream
        self.is_small = is_small
        # An address is unique, so the comparison of two entries never reaches the block itself.
        self.free: list[tuple[int, int, _Block]] = []
        self.unmapped: list[tuple[int, _Block]] = []

    def add(self, block: _Block) -> None:
        if block.mapped:
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: _Block) -> None:
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def widen(self, room: _Block) -> None:
        """Merge the unmapped neighbours into unmapped room, which is in no list at this time.

        Source: torch-caching-allocator, try_merge_blocks.
        """
        before, after = room.previous, room.next
        if before is not None and not before.mapped:
            self.remove(before)
            room.address = before.address
            room.size += before.size
            room.previous = before.previous
            if room.previous is not None:
                room.previous.next = room
        if after is not None and not after.mapped:
            self.remove(after)
            room.size += after.size
            room.next = after.next
            if room.next is not None:
                room.next.previous = room


class CachingAllocator:
    """The state of the allocator of one device.

    Args:
        capacity_bytes: what the driver can give to this process; None for no limit.
        settings: `PYTORCH_ALLOC_CONF`; may be changed on the way with `change_settings`.
        place: where the driver puts a new range of so many bytes; by default above all before.

    Raises:
        InvalidRequestError: a memory fraction of an unknown capacity.

    Example:
        >>> allocator = CachingAllocator()
        >>> allocator.malloc("weight", 43 * MiB).charged_bytes // MiB
        44
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings = DEFAULT_SETTINGS,
        *,
        place: Callable[[int], int] | None = None,
    ) -> None:
        self._capacity = capacity_bytes
        self._place = place
        self.change_settings(settings)
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._live: dict[Hashable, _Block | None] = {}
        self._pending: dict[Hashable, _Block] = {}
        self._synchronized: set[Hashable] = set()
        self._segment_events: list[SegmentEvent] = []
        self._next_address = FIRST_ADDRESS
        self._has_pages = False
        # What is left of merged blocks serves as the next that are split off.
        self._spare: list[_Block] = []
        self.allocated_bytes = self.requested_bytes = 0
        self._reserved = self._waiting = 0
        # Of what is reserved, segments in which nothing is in use.
        self._idle = 0
        self._peak_requested = self._peak_allocated = self._peak_active = self._peak_pinned = 0
        self._num_segments = self._num_alloc_retries = 0
        self.reset_peaks()

    def adopt(
        self, segments: Iterable[Segment], bases: Mapping[tuple[int, bool], int] | None = None
    ) -> None:
        """Begin with segments that another process, or an earlier part of it, has left.

        They are what `segments()` returns. The pieces of the expandable segment of one stream and
        pool belong together.

        Args:
            segments: what is held, in any order.
            bases: where the addresses of the expandable segment of a stream and a pool (small or
                not) begin, if that is below its lowest piece.

        Raises:
            ValueError: a key is in use already.
        """
        expandable: dict[_Pool, list[Segment]] = {}
        for segment in sorted(segments, key=lambda each: each.address):
            pool = self._pool(segment.stream, is_small=segment.is_small)
            if segment.is_expandable:
                expandable.setdefault(pool, []).append(segment)
            else:
                self._adopt_blocks(segment, pool)
                self._num_segments += 1
        for pool, pieces in expandable.items():
            lowest = pieces[0].address
            base = (bases or {}).get((pool.stream, pool.is_small), lowest)
            self._adopt_expandable(pool, pieces, base)
        self.reset_peaks()

    def _adopt_expandable(self, pool: _Pool, pieces: Sequence[Segment], base: int) -> None:
        self._has_pages = True
        page = self._page_bytes(pool)
        pages = _AddressRange(base, page)
        last: _Block | None = None
        for at, piece in zip(
            (base, *(each.address + each.size_bytes for each in pieces)), pieces, strict=False
        ):
            if at < piece.address:
                last = _unmapped(at, piece.address, pool, pages, last)
            last = self._adopt_blocks(piece, pool, pages, last)
        end = pieces[-1].address + pieces[-1].size_bytes
        _unmapped(end, base + self._room_bytes(page), pool, pages, last)

    def _adopt_blocks(
        self,
        segment: Segment,
        pool: _Pool,
        pages: _AddressRange | None = None,
        before: _Block | None = None,
    ) -> _Block:
        """Link the blocks of a segment in behind `before`; return the last one."""
        for each in segment.blocks:
            block = _Block(each.address, each.size_bytes, pool, pages, before)
            block.state, block.key = each.state, each.key
            before = block
            if each.state == "inactive":
                pool.add(block)
                continue
            if each.key is None or each.key in self._live or each.key in self._pending:
                raise ValueError(f"block at {each.address} has no key of its own: {each.key!r}")
            block.requested = each.requested_bytes
            self.requested_bytes += block.requested
            if each.state == "active_allocated":
                self._live[each.key] = block
                self.allocated_bytes += block.size
            else:
                self._pending[each.key] = block
                self._waiting += block.size
        if before is None:
            raise ValueError(f"segment at {segment.address} has no blocks")
        if before.state == "inactive" and before.previous is None and pages is None:
            self._idle += before.size
        self._reserved += segment.size_bytes
        end = round_up(segment.address + segment.size_bytes, LARGE_ROUNDING_BYTES)
        self._next_address = max(self._next_address, end)
        return before

    def change_settings(self, settings: AllocatorSettings) -> None:
        """Change the settings of a running process: blocks that exist keep their kind."""
        if settings.memory_fraction is not None and self._capacity is None:
            raise InvalidRequestError("memory_fraction needs capacity_bytes, which it is a part of")
        self.settings = settings
        self._max_split = (
            sys.maxsize if settings.max_split_size_bytes is None else settings.max_split_size_bytes
        )
        self._allowed = (
            None
            if settings.memory_fraction is None or self._capacity is None
            else int(settings.memory_fraction * self._capacity)
        )

    def malloc(self, key: Hashable, size_bytes: int, stream: int = 0) -> Allocation:
        """Hand out a block under `key`, and say which.

        Raises:
            ValueError: the key is in use, or the size is negative.
            OutOfMemory: nothing more can be released, and it still does not fit.
        """
        self.take(key, size_bytes, stream)
        block = self._live[key]
        return Allocation(0, 0) if block is None else Allocation(block.address, block.size)

    def take(self, key: Hashable, size_bytes: int, stream: int = 0) -> None:
        """Hand out a block under `key`.

        Raises:
            ValueError: the key is in use, or the size is negative.
            OutOfMemory: nothing more can be released, and it still does not fit.
        """
        self.serve(((key, size_bytes),), stream)

    def free(self, key: Hashable) -> None:
        """Take the block of `key` back and make it available at once.

        Raises:
            ValueError: the key is not allocated.
        """
        self.serve(((key, None),))

    def serve(self, calls: Iterable[Call], stream: int = 0) -> tuple[int, int]:
        """Hand out blocks and take them back, one after the other.

        An estimate passes hundreds of thousands of calls through here, so that what happens to all
        of them stands in one loop, with the counters at hand.

        Args:
            calls: in the order of time.
            stream: of what is asked for.

        Returns:
            The most that was handed out behind any of the requests, and what was asked for then
            [bytes].

        Raises:
            ValueError: a key is in use or not allocated, or a size is negative.
            OutOfMemory: nothing more can be released, and it still does not fit.

        Source: torch-caching-allocator, malloc, free_block, should_split.
        """
        live, pending, spare, settings = self._live, self._pending, self._spare, self.settings
        small, large = self._pool(stream, is_small=True), self._pool(stream, is_small=False)
        # Whether some blocks may not serve; the least tail that is split off, and the least request
        # that is never split.
        pages = settings.expandable_segments
        choosy = pages or self._has_pages or self._max_split < sys.maxsize
        in_steps = bool(settings.roundup_power2_divisions)
        least_large = MIN_BLOCK_BYTES if pages else SMALL_REQUEST_BYTES + 1
        unsplit = sys.maxsize if pages else self._max_split
        allocated, requested, idle = self.allocated_bytes, self.requested_bytes, self._idle
        most = asked_at_most = 0
        try:
            for key, asked in calls:
                if asked is None:
                    try:
                        block = live.pop(key)
                    except KeyError:
                        raise ValueError(f"key {key!r} is not allocated") from None
                    if block is None:
                        continue
                    size = block.size
                    allocated -= size
                    requested -= block.requested
                    free, before, after = block.pool.free, block.previous, block.next
                    if after is not None and after.state == "inactive" and after.mapped:
                        del free[bisect_left(free, (after.size, after.address))]
                        size += after.size
                        spare.append(after)
                        after = block.next = after.next
                        if after is not None:
                            after.previous = block
                    if before is not None and before.state == "inactive" and before.mapped:
                        del free[bisect_left(free, (before.size, before.address))]
                        size += before.size
                        block.address = before.address
                        spare.append(before)
                        before = block.previous = before.previous
                        if before is not None:
                            before.next = block
                    block.size = size
                    block.state = "inactive"
                    insort(free, (size, block.address, block))
                    if before is None and after is None and block.expandable is None:
                        idle += size
                    continue
                if key in live or (pending and key in pending):
                    raise ValueError(
                        f"key {key!r} is still allocated; free it before it is used again"
                    )
                if asked <= 0:
                    if asked < 0:
                        raise ValueError(f"cannot allocate {asked} bytes")
                    live[key] = None
                    continue
                if in_steps:
                    size = round_size(asked, settings)
                else:
                    size = (asked + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES
                if size <= SMALL_REQUEST_BYTES:
                    pool, least = small, MIN_BLOCK_BYTES
                else:
                    pool, least = large, least_large
                free = pool.free
                at = self._fitting(free, size) if choosy else bisect_left(free, (size,))
                if at < len(free):
                    block = free.pop(at)[2]
                    if block.next is None and block.previous is None and block.expandable is None:
                        idle -= block.size
                        if self._reserved - idle > self._peak_pinned:
                            self._peak_pinned = self._reserved - idle
                else:
                    self._count(allocated, requested, idle, most)
                    try:
                        block = self._fresh_or_released(pool, size)
                    finally:
                        requested, idle = self.requested_bytes, self._idle
                left = block.size - size
                if left >= least and size < unsplit:
                    tail = spare.pop() if spare else _Block(0, 0, pool)
                    tail.address = address = block.address + size
                    tail.size = left
                    tail.pool = pool
                    tail.expandable = block.expandable
                    tail.previous = block
                    tail.next = after = block.next
                    if after is not None:
                        after.previous = tail
                    block.next = tail
                    block.size = size
                    insort(free, (left, address, tail))
                block.state = "active_allocated"
                block.key = key
                block.requested = asked
                live[key] = block
                requested += asked
                allocated += block.size
                if allocated > most:
                    most, asked_at_most = allocated, requested
                if requested > self._peak_requested:
                    self._peak_requested = requested
        finally:
            self._count(allocated, requested, idle, most)
        return most, asked_at_most

    def request_free(self, key: Hashable) -> None:
        """Take the block of `key` back while another stream still reads it (`record_stream`)."""
        if key not in self._live:
            raise ValueError(f"key {key!r} is not allocated")
        block = self._live.pop(key)
        if block is not None:
            block.state = "active_awaiting_free"
            self._pending[key] = block
            self.allocated_bytes -= block.size
            self._waiting += block.size

    def complete_free(self, key: Hashable) -> None:
        """Make the block available whose `request_free` went before.

        The out-of-memory ladder waits for all streams, so it may have done this already.

        Raises:
            ValueError: the block was not asked to be freed.
        """
        if key in self._pending:
            self._arrive(key)
        elif key in self._synchronized:
            self._synchronized.remove(key)
        else:
            raise ValueError(f"key {key!r} does not wait to be freed")

    def empty_cache(self) -> None:
        """Give every free segment back to the driver, after waiting for all streams.

        Source: torch-caching-allocator, release_cached_blocks, release_blocks.
        """
        for key in list(self._pending):
            self._arrive(key)
            self._synchronized.add(key)
        for is_small in (False, True):
            for stream in sorted(stream for stream, small in self._pools if small is is_small):
                self._release_free(self._pools[stream, is_small])

    def reset_peaks(self) -> None:
        """Start the peaks again from the present values."""
        self._peak_allocated = self.allocated_bytes
        self._peak_reserved = self._reserved
        self._peak_requested = self.requested_bytes
        self._peak_active = self.allocated_bytes + self._waiting
        self._peak_pinned = self._reserved - self._idle

    @property
    def stats(self) -> Stats:
        """The counters at this moment."""
        return Stats(
            allocated_bytes=self.allocated_bytes,
            reserved_bytes=self._reserved,
            requested_bytes=self.requested_bytes,
            active_bytes=self.allocated_bytes + self._waiting,
            peak_allocated_bytes=self._peak_allocated,
            peak_reserved_bytes=self._peak_reserved,
            peak_requested_bytes=self._peak_requested,
            peak_active_bytes=max(self._peak_active, self._peak_allocated),
            peak_pinned_bytes=self._peak_pinned,
            num_segments=self._num_segments,
            num_alloc_retries=self._num_alloc_retries,
        )

    @property
    def segment_events(self) -> Sequence[SegmentEvent]:
        """Every exchange with the driver so far, in order."""
        return self._segment_events

    def segments(self) -> tuple[Segment, ...]:
        """What the device holds now, by address: one entry for each contiguous mapped range."""
        return tuple(_describe(run) for run in _mapped_runs(self._blocks()))

    def _pool(self, stream: int, *, is_small: bool) -> _Pool:
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = _Pool(stream, is_small=is_small)
        return pool

    def _blocks(self) -> list[_Block]:
        free = (entry[-1] for pool in self._pools.values() for entry in pool.free)
        in_use = (block for block in self._live.values() if block is not None)
        return sorted(chain(free, in_use, self._pending.values()), key=lambda block: block.address)

    def _count_reserved(self, kind: SegmentEventKind, address: int, size: int, stream: int) -> None:
        taken = kind in ("segment_alloc", "segment_map")
        self._reserved += size if taken else -size
        if self._reserved > self._peak_reserved:
            self._peak_reserved = self._reserved
        if taken:
            self._see_pinned()
        self._segment_events.append(SegmentEvent(kind, address, size, stream))

    def _arrive(self, key: Hashable) -> None:
        """Take back the block of `key`, which no stream reads any more."""
        block = self._pending.pop(key)
        self._waiting -= block.size
        self._make_available(block)

    def _make_available(self, block: _Block) -> None:
        """Put a block that is no longer allocated, or new, among the free ones."""
        self._live[block] = block
        self.allocated_bytes += block.size
        self.free(block)

    def _count(self, allocated: int, requested: int, idle: int, most: int) -> None:
        """Set the counters, of which the first has risen to `most`."""
        self.allocated_bytes, self.requested_bytes, self._idle = allocated, requested, idle
        if most > self._peak_allocated:
            self._peak_allocated = most
        if self._waiting and most + self._waiting > self._peak_active:
            self._peak_active = most + self._waiting

    def _fitting(self, free: list[tuple[int, int, _Block]], size: int) -> int:
        """Return the place of the smallest free block that may serve, or the number of them.

        Source: torch-caching-allocator, get_free_block.
        """
        at = bisect_left(free, (size,))
        if at == len(free):
            return at
        if free[at][2].expandable:
            at = self._best_expandable(free, at)
            if at == len(free):
                return at
        if size < self._max_split:
            suits = free[at][0] < self._max_split
        else:
            suits = free[at][0] < size + self.settings.max_non_split_rounding_bytes
        return at if suits else len(free)

    def _see_pinned(self) -> None:
        pinned = self._reserved - self._idle
        if pinned > self._peak_pinned:
            self._peak_pinned = pinned

    def _best_expandable(self, free: list[tuple[int, int, _Block]], at: int) -> int:
        """Return the place of the block to use when the best fit lies in an expandable segment.

        A block before unmapped room counts with that room, so that the end of the segment is
        used last. While expandable segments are switched off, only other blocks may serve.
        """
        if not self.settings.expandable_segments:
            while at < len(free) and free[at][2].expandable:
                at += 1
            return at
        while (
            free[at][2].expandable
            and at + 1 < len(free)
            and free[at + 1][2].expandable_size < free[at][2].expandable_size
        ):
            at += 1
        return at

    def _fresh_or_released(self, pool: _Pool, size: int) -> _Block:
        """Take new memory from the driver, releasing more and more of the cache to get it.

        Source: torch-caching-allocator, malloc.
        """
        block = self._fresh(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._fresh(pool, size)
        if block is None:
            self.empty_cache()
            self._num_alloc_retries += 1
            block = self._fresh(pool, size)
        if block is None:
            raise OutOfMemory(
                tried_bytes=segment_size(size, self.settings),
                total_bytes=0 if self._capacity is None else self._capacity,
                allowed_bytes=self._allowed,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self._reserved,
            )
        return block

    def _fresh(self, pool: _Pool, size: int) -> _Block | None:
        """Take a new segment, or new pages, from the driver; None if it has none to give.

        Source: torch-caching-allocator, alloc_block.
        """
        new = segment_size(size, self.settings)
        # Upstream compares the fraction with the fixed segment even where it then maps pages.
        if self._allowed is not None and self._reserved + new > self._allowed:
            return None
        if self.settings.expandable_segments:
            return self._fresh_expandable(pool, size)
        if not self._driver_has(new):
            return None
        block = _Block(self._address_space(new), new, pool)
        self._num_segments += 1
        self._count_reserved("segment_alloc", block.address, new, pool.stream)
        return block

    def _driver_has(self, size: int) -> bool:
        return self._capacity is None or self._reserved + size <= self._capacity

    def _address_space(self, size: int) -> int:
        if self._place is not None:
            return self._place(size)
        address = self._next_address
        self._next_address += round_up(size, LARGE_ROUNDING_BYTES)
        return address

    def _fresh_expandable(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages behind, or between, the free blocks of the stream's growing segment.

        Source: torch-caching-allocator, try_allocate_expandable_block.
        """
        block = self._expandable_candidate(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            follower = block.next
            if follower is None or not self._map(follower, min(size - block.size, follower.size)):
                return None
            block = follower
        pool.remove(block)
        return block

    def _expandable_candidate(self, pool: _Pool, size: int) -> _Block:
        """Return the lowest block where `size` fits into free and unmapped room, or new room.

        Source: torch-caching-allocator, find_expandable_block.
        """
        for _, unmapped in pool.unmapped:
            before = unmapped.previous
            start = before if before is not None and before.state == "inactive" else unmapped
            if _has_room(start, size):
                return start
        self._has_pages = True
        page = self._page_bytes(pool)
        room = self._room_bytes(page, size)
        base = self._address_space(room)
        block = _Block(base, room, pool, _AddressRange(base, page))
        block.mapped = False
        pool.add(block)
        return block

    def _page_bytes(self, pool: _Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.is_small else self.settings.large_segment_bytes

    def _room_bytes(self, page: int, at_least: int = 0) -> int:
        """Return how many addresses one expandable segment reserves."""
        room = (
            max(UNBOUNDED_ADDRESS_SPACE, at_least)
            if self._capacity is None
            # 9/8 of the device, so that pages unmapped at the front can come back at the end.
            else self._capacity + self._capacity // 8
        )
        return round_up(room, page)

    def _map(self, block: _Block, size: int) -> bool:
        """Back the front of an unmapped block with pages and merge it with its free neighbours.

        Source: torch-caching-allocator, map_block and ExpandableSegment::map.
        """
        assert block.expandable is not None  # no other block is ever unmapped
        mapped = round_up(size, block.expandable.page_bytes)
        if not self._driver_has(mapped):
            return False
        pool = block.pool
        pool.remove(block)
        self._count_reserved("segment_map", block.address, mapped, pool.stream)
        if mapped < block.size:
            at, left = block.address + mapped, block.size - mapped
            rest = _Block(at, left, pool, block.expandable, block)
            rest.mapped = False
            pool.add(rest)
            block.size = mapped
        block.mapped, block.requested = True, 0
        self._make_available(block)
        return True

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Release just enough never-split blocks to make room, the largest first.

        Source: torch-caching-allocator, release_available_cached_blocks; that
        expandable blocks are passed over is in the releases since 2.7 (test_max_split_expandable).
        """
        if self._max_split == sys.maxsize:
            return False
        wanted = max(size, self._max_split)
        at = bisect_left(pool.free, (wanted,))
        if at < len(pool.free) and not pool.free[at][2].expandable:
            self._release_segment(pool.free[at][2])
            return True
        largest_first = [block for _, _, block in reversed(pool.free[:at])]
        released = 0
        for block in largest_first:
            if released >= wanted or block.size < self._max_split:
                break
            if not block.expandable:
                released += block.size
                self._release_segment(block)
        return released >= wanted

    def _release_free(self, pool: _Pool) -> None:
        """Release the free segments and pages of one pool."""
        blocks = [block for _, _, block in pool.free]
        for block in blocks:
            if not block.expandable and block.previous is None and block.next is None:
                self._release_segment(block)
        for block in blocks:
            if block.expandable is not None:
                self._unmap(block, block.expandable)

    def _release_segment(self, block: _Block) -> None:
        block.pool.remove(block)
        self._idle -= block.size
        self._num_segments -= 1
        self._count_reserved("segment_free", block.address, block.size, block.pool.stream)

    def _unmap(self, block: _Block, pages: _AddressRange) -> None:
        """Give the pages that lie wholly inside a free block back to the driver.

        Source: torch-caching-allocator, unmap_block, ExpandableSegment::unmap.
        """
        pool, (base, page) = block.pool, pages
        begin = base + round_up(block.address - base, page)
        end = base + (block.address + block.size - base) // page * page
        if begin >= end:
            return
        pool.remove(block)
        before, after = begin - block.address, block.address + block.size - end
        if before:
            head = _Block(block.address, before, pool, pages)
            head.previous, head.next = block.previous, block
            if block.previous is not None:
                block.previous.next = head
            block.previous = head
            pool.add(head)
        if after:
            tail = _Block(end, after, pool, pages, block)
            pool.add(tail)
        block.address, block.size, block.mapped = begin, end - begin, False
        pool.widen(block)
        self._count_reserved("segment_unmap", begin, end - begin, pool.stream)
        if block.previous is not None or block.next is not None:
            pool.add(block)
        # Otherwise the whole address range is unmapped, and upstream returns it as well.


def _has_room(start: _Block, size: int) -> bool:
    room, block = 0, start
    while room < size:
        if block.state != "inactive":
            return False
        room += block.size
        if block.next is None:
            return room >= size
        block = block.next
    return True


def _unmapped(
    begin: int, end: int, pool: _Pool, pages: _AddressRange, before: _Block | None
) -> _Block:
    """Make the unmapped room of an expandable segment between two addresses."""
    room = _Block(begin, end - begin, pool, pages, before)
    room.mapped = False
    pool.add(room)
    return room


def _mapped_runs(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """Group blocks, given by address, into contiguous mapped ranges."""
    run: list[_Block] = []
    for block in blocks:
        if run and run[-1].next is not block:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _describe(run: Sequence[_Block]) -> Segment:
    head = run[0]
    return Segment(
        address=head.address,
        size_bytes=sum(block.size for block in run),
        stream=head.pool.stream,
        is_small=head.pool.is_small,
        is_expandable=head.expandable is not None,
        blocks=tuple(
            Block(block.address, block.size, 0, "inactive", None)
            if block.state == "inactive"
            else Block(block.address, block.size, block.requested, block.state, block.key)
            for block in run
        ),
    )


class Replay(Struct, frozen=True):
    """What a whole trace left behind: the counters and every exchange with the driver."""

    stats: Stats
    segment_events: tuple[SegmentEvent, ...]
    segments: tuple[Segment, ...]


def replay(
    events: Iterable[AllocationEvent],
    *,
    capacity_bytes: int | None = None,
    settings: AllocatorSettings = DEFAULT_SETTINGS,
) -> Replay:
    """Run a trace through a new allocator.

    Raises:
        OutOfMemory: the trace does not fit into `capacity_bytes`.
        ValueError: an event frees what is not allocated, or allocates a key twice.

    Example:
        >>> trace = [AllocationEvent("alloc", 1, 43 * MiB), AllocationEvent("free", 1)]
        >>> replay(trace).stats.peak_allocated_bytes // MiB
        44
    """
    allocator = CachingAllocator(capacity_bytes, settings)
    for event in events:
        apply(allocator, event)
    return Replay(allocator.stats, tuple(allocator.segment_events), allocator.segments())


def apply(allocator: CachingAllocator, event: AllocationEvent) -> None:
    """Run one event of a trace."""
    kind = event.kind
    if kind == "alloc":
        allocator.malloc(event.key, event.size_bytes, event.stream)
    elif kind == "free":
        allocator.free(event.key)
    elif kind == "free_requested":
        allocator.request_free(event.key)
    elif kind == "free_completed":
        allocator.complete_free(event.key)
    elif kind == "empty_cache":
        allocator.empty_cache()
    else:
        raise ValueError(f"unknown kind of event {kind!r}")
