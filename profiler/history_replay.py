"""A history replayed through the model of the allocator and compared, exchange by exchange.

The model is given the requests, and two answers of others: where the driver put a new segment
(which only breaks ties between free blocks of equal size), and when the cache was released. A call
of `empty_cache` leaves no event of its own, and a release by the allocator itself depends on how
much the driver had left, which is not recorded. Where one capacity of the driver explains all
releases (`room`), the model is not told of them either: given the capacity it has to release at the
same moments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from estimator.errors import EstimatorError, InvalidRequestError
from estimator.memory.caching_allocator import (
    CachingAllocator,
    OutOfMemory,
    Segment,
    SegmentEvent,
    round_size,
    segment_size,
)
from estimator.units import gib
from profiler import history as fixture
from profiler import snapshot
from profiler.history import SPAN, Event, History
from profiler.recording import CannotReplayError

_CONTEXT: Final = 4
_BLOCKS_SHOWN: Final = 8
_RELEASES: Final = ("segment_free", "segment_unmap")
_TAKES: Final = ("segment_alloc", "segment_map")


class Difference(Struct, frozen=True):
    """The first thing that the model did not predict.

    Args:
        number: of the event in the history; the number of all events where only the end differs.
        recorded: what the device did, in words.
        predicted: what the model does.
        before: the events that lead there.
    """

    number: int
    recorded: str
    predicted: str
    before: tuple[str, ...]


class Room(Struct, frozen=True):
    """What the driver had for this process: at least the one, less than the other [bytes]."""

    at_least: int
    below: int


class Comparison(Struct, frozen=True):
    """How far the model went with the device.

    Args:
        events: in the history.
        allocations: that landed where the device put them.
        exchanges: with the driver that were predicted, in their order.
        releases: how often the device released its cache, as far as the model went.
        room: that explains every release; the model was told the lower end and no release.
        peak_reserved_bytes: of the model.
        difference: the first thing that was not predicted; None if all was.
    """

    events: int
    allocations: int
    exchanges: int
    releases: int
    room: Room | None
    peak_reserved_bytes: int
    difference: Difference | None


def replay(history: History) -> Comparison:
    """Run the model through a history and say where it parts from the device."""
    explained = room(history)
    if explained is not None:
        found = _Replay(history, explained).run()
        if found.difference is None:
            return found
    return _Replay(history, None).run()


def room(history: History) -> Room | None:
    """Return what the driver had, if one capacity can explain every release; else None.

    It could give what it gave, and had less than the cache and the segment together that it was
    asked for when the cache was released. Pages of expandable segments say nothing about what was
    asked for first, so nothing is said of them.
    """
    if history.settings.expandable_segments:
        return None
    reserved = before = sum(each.size_bytes for each in history.start)
    at_least, refused = reserved, []
    releasing = False
    for event in history.events:
        if event.kind in _RELEASES:
            before = before if releasing else reserved
            reserved -= event.size
        elif event.kind in _TAKES:
            if releasing:
                refused.append(before + event.size)
            reserved += event.size
            at_least = max(at_least, reserved)
        elif event.kind == "oom":
            block = round_size(event.size, history.settings)
            refused.append(reserved + segment_size(block, history.settings))
        elif releasing:
            return None  # nothing was taken after it, so somebody asked for the release
        releasing = event.kind in _RELEASES
    if releasing or not refused or min(refused) <= at_least:
        return None
    return Room(at_least, min(refused))


class _Differs(Exception):  # noqa: N818 - what it says, not a fault
    """The model and the device part here."""

    def __init__(self, recorded: str, predicted: str) -> None:
        super().__init__(recorded, predicted)
        self.recorded, self.predicted = recorded, predicted


class _Replay:
    """The model on its way through a history."""

    def __init__(self, history: History, room: Room | None) -> None:
        self.history, self.room = history, room
        capacity = None if room is None else room.at_least
        self.model = CachingAllocator(capacity, history.settings, place=self._driver)
        self.model.adopt(history.start, _bases(history.start))
        self.allocations = self.exchanges = self.releases = 0
        # Exchanges with the driver that the device recorded since the last request.
        self.recorded: list[Event] = []

    def run(self) -> Comparison:
        """Go through the history to its end, or to where model and device part."""
        difference, events = None, self.history.events
        number = -1
        try:
            for event in events:
                number += 1
                try:
                    self.step(event)
                except ValueError as error:
                    raise _Differs(str(event), str(error)) from error
            number = len(events)
            self._release()
            self._compare_end()
        except _Differs as parted:
            before = tuple(str(each) for each in events[max(0, number - _CONTEXT) : number])
            difference = Difference(number, parted.recorded, parted.predicted, before)
        return Comparison(
            events=len(events),
            allocations=self.allocations,
            exchanges=self.exchanges,
            releases=self.releases,
            room=self.room,
            peak_reserved_bytes=self.model.stats.peak_reserved_bytes,
            difference=difference,
        )

    def step(self, event: Event) -> None:
        """Ask the model what the device was asked, and compare what they did."""
        if event.kind in _RELEASES or event.kind in _TAKES:
            self.recorded.append(event)
            return
        self._release()
        if event.kind == "alloc":
            self._allocate(event)
        elif event.kind == "free_requested":
            self.model.request_free(event.key)
        elif event.kind == "free_completed":
            self.model.complete_free(event.key)
        elif self.room is not None:
            self._run_out(event)
        self._compare_exchanges()

    def _allocate(self, event: Event) -> None:
        try:
            given = self.model.malloc(event.key, event.size, event.stream)
        except OutOfMemory as error:
            raise _Differs(str(event), str(error)) from error
        self._compare_exchanges()
        if given.address != event.address:
            raise _Differs(str(event), f"it at {_place(given.address)}")
        self.allocations += 1

    def _run_out(self, event: Event) -> None:
        try:
            given = self.model.malloc(("refused", event.size), event.size, event.stream)
        except OutOfMemory:
            return
        raise _Differs(str(event), f"it at {_place(given.address)}")

    def _release(self) -> None:
        """Count a release of the cache; without a capacity, tell the model of it."""
        released = [each for each in self.recorded if each.kind in _RELEASES]
        if not released:
            return
        self.releases += 1
        if self.room is None:
            taken = self.recorded[len(released) :]
            self.recorded = released
            self.model.empty_cache()
            self._compare_exchanges()
            self.recorded = taken

    def _driver(self, size: int) -> int:
        """Put a new segment where the device's driver put it."""
        for each in self.recorded:
            if each.kind in _TAKES:
                return each.address
        raise _Differs("no new segment", f"a new segment of {size} bytes")

    def _compare_exchanges(self) -> None:
        """Compare what the driver was asked since the last comparison."""
        predicted = self.model.segment_events[self.exchanges :]
        for number in range(max(len(predicted), len(self.recorded))):
            ours = predicted[number] if number < len(predicted) else None
            event = self.recorded[number] if number < len(self.recorded) else None
            if ours is None or event is None or tuple(ours) != _as_exchange(event):
                raise _Differs(str(event or "no exchange with the driver"), _exchange(ours))
            self.exchanges += 1
        self.recorded = []

    def _compare_end(self) -> None:
        predicted, recorded = self.model.segments(), self.history.end
        for ours, theirs in zip(predicted, recorded, strict=False):
            if _shape(ours) != _shape(theirs):
                raise _Differs(f"at the end {_layout(theirs)}", _layout(ours))
        if len(predicted) != len(recorded):
            raise _Differs(f"{len(recorded)} segments at the end", f"{len(predicted)} segments")


def _bases(segments: Iterable[Segment]) -> dict[tuple[int, bool], int]:
    """Return where expandable segments begin: their number is a part of their addresses."""
    return {
        (each.stream, each.is_small): each.address // SPAN * SPAN
        for each in segments
        if each.is_expandable
    }


def _as_exchange(event: Event) -> tuple[str, int, int, int]:
    return event.kind, event.address, event.size, event.stream


def _shape(segment: Segment) -> tuple[Any, ...]:
    blocks = tuple((each.address, each.size_bytes, each.state) for each in segment.blocks)
    return (segment.address, segment.size_bytes, segment.stream, segment.is_small, blocks)


def _place(address: int) -> str:
    return f"segment {address // SPAN} + {address % SPAN}"


def _exchange(event: SegmentEvent | None) -> str:
    if event is None:
        return "no exchange with the driver"
    return f"{event.kind} of {event.size_bytes} bytes at {_place(event.address)}"


def _layout(segment: Segment) -> str:
    blocks = ", ".join(
        f"{'free' if each.state == 'inactive' else 'used'} {each.size_bytes}"
        for each in segment.blocks[:_BLOCKS_SHOWN]
    )
    more = ", ..." if len(segment.blocks) > _BLOCKS_SHOWN else ""
    return f"{_place(segment.address)} of {segment.size_bytes} bytes: {blocks}{more}"


def text(found: Comparison) -> str:
    """Return a comparison in words."""
    return "\n".join(_lines(found))


def _lines(found: Comparison) -> Iterator[str]:
    all_of = "all " if found.difference is None else ""
    yield (
        f"{found.events} events, {all_of}predicted: {found.allocations} allocations where the "
        f"device put them, {found.exchanges} exchanges with the driver, {found.releases} releases "
        f"of the cache; at most {gib(found.peak_reserved_bytes)} reserved"
    )
    if found.room is not None:
        yield (
            f"the driver had {gib(found.room.at_least)} to {gib(found.room.below)}: told that, the "
            "model releases the cache at the same moments"
        )
    if found.difference is not None:
        yield f"event {found.difference.number} differs"
        yield f"  the device: {found.difference.recorded}"
        yield f"  the model:  {found.difference.predicted}"
        yield "  before it:"
        for each in found.difference.before:
            yield f"    {each}"


def histories(path: Path, device: int | None = None) -> Iterator[tuple[int, History]]:
    """Yield the history of each recorded device, or of one, in a snapshot or a fixture.

    Raises:
        EstimatorError: the file is neither, or cannot be replayed.
    """
    if fixture.is_fixture(path):
        yield 0, fixture.read(path)
        return
    dumped = snapshot.load(path)
    recorded = snapshot.devices(dumped) if device is None else (device,)
    if not recorded:
        raise CannotReplayError(
            f"no events are recorded in {path}; call torch.cuda.memory._record_memory_history() "
            "before the run"
        )
    for number in recorded:
        yield number, snapshot.history(dumped, number)


def answer(
    path: Path, device: int | None, write: Path | None, provenance: str
) -> Iterator[tuple[str, bool]]:
    """Yield for every device what became of it, in words, and whether all was predicted.

    Raises:
        EstimatorError: the file is no recording, or cannot be replayed.
    """
    found = list(histories(path, device))
    if write is not None and len(found) > 1:
        known = ", ".join(str(number) for number, _ in found)
        raise InvalidRequestError(f"a fixture holds one device; add --device, one of {known}")
    for number, each in found:
        compared = replay(each)
        yield f"device {number}: {text(compared)}", compared.difference is None
        if write is not None:
            fixture.write(write, each, provenance)


def main(arguments: Sequence[str]) -> int:
    """Do what `estimate replay` does, with nothing but the standard library."""
    parser = argparse.ArgumentParser(prog="python -m profiler.history")
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--device", type=int)
    parser.add_argument("--write-fixture", type=Path, metavar="FILE")
    parser.add_argument("--provenance", default="", metavar="TEXT")
    given = parser.parse_args(arguments)
    code = 0
    try:
        for said, predicted in answer(
            given.snapshot, given.device, given.write_fixture, given.provenance
        ):
            print(said)
            code = code if predicted else 1
    except EstimatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return code
