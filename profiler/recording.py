"""A recording of a device turned into a history that can be replayed from its beginning.

A snapshot says what the device held at the end, not what was there when the recording began. Here
the events are undone from the last to the first, which leaves the segments and blocks of the
beginning; so a recording that began in the middle of a run, or whose ring buffer lost its first
events, is replayed all the same.

An event names the bytes that were asked for, a block of the dump also those that it takes. Of a
block that was there at the beginning and is gone at the end, what it takes follows from its
surroundings (`_sized`).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import Final, NamedTuple

from estimator.errors import CannotEstimateError
from estimator.memory.caching_allocator import (
    SMALL_REQUEST_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorSettings,
    Block,
    BlockState,
    Segment,
    round_size,
)
from estimator.units import MiB
from profiler.history import SPAN, Event, History, Kind

# Every expandable segment is mapped in multiples of this.
PAGE_BYTES: Final = 2 * MiB


class CannotReplayError(CannotEstimateError):
    """The snapshot is one, and cannot be replayed exactly."""


class Record(NamedTuple):
    """One event as the snapshot has it."""

    kind: Kind
    address: int
    size: int
    stream: int


class Taken(NamedTuple):
    """A block in use: what was asked for, and what it takes where the dump says so."""

    requested: int
    size: int | None
    state: BlockState


class Held(NamedTuple):
    """A segment that was allocated by itself."""

    size: int
    stream: int
    is_small: bool


class Piece(NamedTuple):
    """One contiguous range of device memory."""

    address: int
    size: int
    stream: int
    is_small: bool
    is_expandable: bool


Pool = tuple[int, bool]
Pools = dict[int, Pool]
"""Of every page that was ever mapped: its stream, and whether small requests are served from it."""


class State(NamedTuple):
    """What the device held at one moment, by address: segments, pages and blocks in use.

    A page is known by its stream. Whether small requests are served from it is known of those that
    the dump lists (`small`), and of the others by `_pools`.
    """

    segments: dict[int, Held]
    pages: dict[int, int]
    blocks: dict[int, Taken]
    small: dict[int, bool]


def history_of(end: State, records: Sequence[Record], settings: AllocatorSettings) -> History:
    """Return the history of what was recorded until the device held `end`.

    Raises:
        CannotReplayError: some events before the end are missing.
    """
    start = _undone(end, records)
    pools = _pools(start, end, records, settings)
    naming = _Naming(start, records, pools)
    begin = naming.segments(_pieces(start, pools), _sized(start, records, pools, settings))
    events = tuple(naming.event(each) for each in records)
    return History(settings, begin, events, naming.segments(_pieces(end, pools), end.blocks))


def _undone(end: State, records: Sequence[Record]) -> State:
    """Return the state before the first event, by undoing the events from the last to the first.

    Raises:
        CannotReplayError: an event does not go with what follows it.
    """
    state = State(dict(end.segments), dict(end.pages), dict(end.blocks), end.small)
    for number in range(len(records) - 1, -1, -1):
        record = records[number]
        try:
            _undo(state, record)
        except KeyError:
            raise CannotReplayError(
                f"event {number} of {len(records)}, {record.kind} of {record.size} bytes, does not "
                "go with the events and segments after it; dump the snapshot on the device's last "
                "event, while the recording still runs"
            ) from None
    return state


def _undo(state: State, record: Record) -> None:
    kind, address, size, stream = record
    if kind == "alloc":
        if state.blocks.pop(address).state != "active_allocated":
            raise KeyError(address)
    elif kind == "free_requested":
        block = state.blocks[address]
        if block.state != "active_awaiting_free":
            raise KeyError(address)
        state.blocks[address] = block._replace(state="active_allocated")
    elif kind == "free_completed":
        if address in state.blocks:
            raise KeyError(address)
        state.blocks[address] = Taken(size, None, "active_awaiting_free")
    elif kind == "segment_alloc":
        del state.segments[address]
    elif kind == "segment_free":
        if address in state.segments:
            raise KeyError(address)
        state.segments[address] = Held(size, stream, size == SMALL_SEGMENT_BYTES)
    elif kind == "segment_map":
        for page in pages(address, size):
            del state.pages[page]
    elif kind == "segment_unmap":
        for page in pages(address, size):
            if page in state.pages:
                raise KeyError(page)
            state.pages[page] = stream


def pages(address: int, size: int) -> range:
    if address % PAGE_BYTES or size % PAGE_BYTES:
        raise ValueError(f"pages of {size} bytes at {address}")
    return range(address, address + size, PAGE_BYTES)


def _pools(
    start: State, end: State, records: Sequence[Record], settings: AllocatorSettings
) -> Pools:
    """Find out which pool every page ever mapped belongs to.

    The dump says it of the pages that it lists, a block of the page that it lies in; pages that
    touch belong together. Of pages that were free and went back to the driver it is known by what
    went back at a time: the large pool maps whole large segments.
    """
    streams = start.pages | end.pages
    is_small = dict(end.small)
    for record in records:
        if record.kind in ("segment_map", "segment_unmap"):
            for page in pages(record.address, record.size):
                streams[page] = record.stream
                if record.size % settings.large_segment_bytes:
                    is_small[page] = True
    for address, size in _blocks_seen(start, records):
        page = address - address % PAGE_BYTES
        if page in streams:
            is_small[page] = round_size(size, settings) <= SMALL_REQUEST_BYTES
    pools: Pools = {}
    run: list[int] = []
    for page in sorted(streams):
        if run and (page != run[-1] + PAGE_BYTES or streams[page] != streams[run[-1]]):
            pools.update(_run_pools(run, streams[run[-1]], is_small))
            run = []
        run.append(page)
    if run:
        pools.update(_run_pools(run, streams[run[-1]], is_small))
    return pools


def _blocks_seen(start: State, records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    for address, taken in start.blocks.items():
        yield address, taken.requested
    for record in records:
        if record.kind == "alloc":
            yield record.address, record.size


def _run_pools(run: Sequence[int], stream: int, is_small: Mapping[int, bool]) -> Pools:
    """Return the pools of pages that touch; what nothing is known of follows the page before."""
    last = next((is_small[page] for page in run if page in is_small), False)
    pools: Pools = {}
    for page in run:
        last = is_small.get(page, last)
        pools[page] = (stream, last)
    return pools


def _pieces(state: State, pools: Pools) -> tuple[Piece, ...]:
    """Return what the device held, by address; pages of one pool that touch are one piece."""
    pieces = [
        Piece(address, held.size, held.stream, held.is_small, False)
        for address, held in state.segments.items()
    ]
    runs: list[Piece] = []
    for page in sorted(state.pages):
        last = runs[-1] if runs else None
        if last and last.address + last.size == page and last[2:4] == pools[page]:
            runs[-1] = last._replace(size=last.size + PAGE_BYTES)
        else:
            runs.append(Piece(page, PAGE_BYTES, *pools[page], True))
    return tuple(sorted([*pieces, *runs]))


def _within(blocks: Mapping[int, Taken], pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Yield for every piece the addresses of the blocks in it.

    Raises:
        CannotReplayError: a block lies in no piece.
    """
    addresses = sorted(blocks)
    at = 0
    for piece in pieces:
        first = at
        while at < len(addresses) and addresses[at] < piece.address + piece.size:
            at += 1
        if first < at and addresses[first] < piece.address:
            break
        yield addresses[first:at]
    if at < len(addresses):
        raise CannotReplayError(
            "blocks are in use where no segment is: some events before the dump are missing; dump "
            "the snapshot while the recording still runs"
        )


def _sized(
    start: State, records: Sequence[Record], pools: Pools, settings: AllocatorSettings
) -> dict[int, Taken]:
    """Return the blocks of the beginning with the bytes that each takes.

    Where the device did not split the tail off (at most 1 MiB, large pool), the tail is part of the
    block. A longer rest behind a block is free, and its first bytes may be such a tail: then the
    next allocation from the rest does not begin where the request ended.

    Source: torch-caching-allocator, should_split.
    """
    sized, open_ended = dict(start.blocks), {}
    pieces = _pieces(start, pools)
    for piece, inside in zip(pieces, _within(start.blocks, pieces), strict=True):
        for address, limit in pairwise([*inside, piece.address + piece.size]):
            block = start.blocks[address]
            if block.size is not None:
                continue
            asked = round_size(block.requested, settings)
            if not piece.is_small and not piece.is_expandable:
                tail = limit - address - asked
                if tail <= SMALL_REQUEST_BYTES or asked >= _max_split(settings):
                    asked += tail
                else:
                    open_ended[address] = asked
            sized[address] = block._replace(size=asked)
    for address, size in _tails(open_ended, records):
        sized[address] = sized[address]._replace(size=size)
    return sized


def _max_split(settings: AllocatorSettings) -> int:
    return settings.max_split_size_bytes or 1 << 62


def _tails(open_ended: Mapping[int, int], records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Yield the blocks behind which a later allocation leaves a tail, with what they take."""
    watched = sorted(open_ended)
    for record in records:
        if record.kind == "free_requested" and record.address in open_ended:
            at = bisect_right(watched, record.address) - 1
            if at >= 0 and watched[at] == record.address:
                del watched[at]
        elif record.kind == "alloc" and watched:
            at = bisect_right(watched, record.address) - 1
            before = watched[at] if at >= 0 else record.address
            taken = record.address - before
            if taken and 0 <= taken - open_ended[before] <= SMALL_REQUEST_BYTES:
                del watched[at]
                yield before, taken


def _ranges(start: State, records: Sequence[Record], pools: Pools) -> dict[Pool, list[int]]:
    """Return where the expandable segments of each pool begin, one after the other.

    One ends when the last of its pages is unmapped. Its addresses may begin below the first page
    that was mapped, so it begins with the lowest that is ever seen.
    """
    ranges: dict[Pool, list[int]] = {}
    mapped: Counter[Pool] = Counter()
    for page in sorted(start.pages):
        ranges.setdefault(pools[page], [page])
        mapped[pools[page]] += 1
    for record in records:
        if record.kind == "segment_map":
            pool = pools[record.address]
            if mapped[pool]:
                ranges[pool][-1] = min(ranges[pool][-1], record.address)
            else:
                ranges.setdefault(pool, []).append(record.address)
            mapped[pool] += record.size // PAGE_BYTES
        elif record.kind == "segment_unmap":
            mapped[pools[record.address]] -= record.size // PAGE_BYTES
    return ranges


class _Naming:
    """Small numbers for blocks, segments and streams, in place of addresses and pointers."""

    def __init__(self, start: State, records: Sequence[Record], pools: Pools) -> None:
        pointers = {stream for stream, _ in pools.values()} | {each.stream for each in records}
        pointers |= {held.stream for held in start.segments.values()}
        self._streams = {pointer: number for number, pointer in enumerate(sorted(pointers))}
        self._pools = pools
        self._ranges = _ranges(start, records, pools)
        bases = {*start.segments, *(base for each in self._ranges.values() for base in each)}
        bases |= {each.address for each in records if each.kind == "segment_alloc"}
        self._numbers = {base: number for number, base in enumerate(sorted(bases))}
        self._held = sorted(start.segments)
        self._mapped = Counter(pools[page] for page in start.pages)
        self._keys: dict[int, int] = {}
        self._free_keys: list[int] = []

    def segments(self, pieces: Sequence[Piece], blocks: Mapping[int, Taken]) -> tuple[Segment, ...]:
        """Return the pieces with their blocks, in use and free."""
        inside = _within(blocks, pieces)
        return tuple(
            Segment(
                self._name(piece.address),
                piece.size,
                self._streams[piece.stream],
                piece.is_small,
                piece.is_expandable,
                tuple(self._tiles(piece, [(each, blocks[each]) for each in addresses])),
            )
            for piece, addresses in zip(pieces, inside, strict=True)
        )

    def _tiles(self, piece: Piece, taken: Iterable[tuple[int, Taken]]) -> Iterator[Block]:
        at, base = piece.address, self._name(piece.address)
        for address, block in taken:
            assert block.size is not None  # the dump says so, or `_sized`
            if address < at:
                raise ValueError(f"blocks overlap at {address}")
            if address > at:
                yield Block(base + at - piece.address, address - at, 0, "inactive", None)
            key = self._keys.get(address)
            key = self._new_key(address) if key is None else key
            named = base + address - piece.address
            yield Block(named, block.size, block.requested, block.state, key)
            at = address + block.size
        end = piece.address + piece.size
        if at > end:
            raise ValueError(f"blocks reach beyond their segment at {at}")
        if at < end:
            yield Block(base + at - piece.address, end - at, 0, "inactive", None)

    def _new_key(self, address: int) -> int:
        key = heappop(self._free_keys) if self._free_keys else len(self._keys)
        self._keys[address] = key
        return key

    def _name(self, address: int) -> int:
        """Return the address that stands for one of the device's."""
        page = self._pools.get(address - address % PAGE_BYTES)
        if page is not None:
            base = self._ranges[page][0]
        else:
            at = bisect_right(self._held, address) - 1
            if at < 0:
                raise CannotReplayError("a block was allocated where no segment is")
            base = self._held[at]
        return self._numbers[base] * SPAN + address - base

    def _unmap(self, pool: Pool, count: int) -> None:
        self._mapped[pool] -= count
        if not self._mapped[pool] and len(self._ranges[pool]) > 1:
            # The driver got the addresses back; those of the next one are others.
            del self._ranges[pool][0]

    def event(self, record: Record) -> Event:
        """Return an event in numbers; they must come in their order."""
        kind, address, size, _ = record
        key = 0
        if kind == "segment_alloc":
            insort(self._held, address)
        elif kind == "segment_map":
            self._mapped[self._pools[address]] += size // PAGE_BYTES
        elif kind == "alloc":
            key = self._new_key(address)
        elif kind.startswith("free"):
            key = self._keys[address]
        named = 0 if kind == "oom" else self._name(address)
        if kind == "segment_free":
            self._held.remove(address)
        elif kind == "segment_unmap":
            self._unmap(self._pools[address], size // PAGE_BYTES)
        elif kind == "free_completed":
            heappush(self._free_keys, self._keys.pop(address))
        return Event(kind, key, size, self._streams[record.stream], named)
