"""Histories of a device's allocator: what it was asked, and every exchange with the driver.

A history is a recording (`profiler/snapshot.py`) without addresses, stack frames and file names: an
address is the number of its segment and the offset in it. Replayed (`profiler/history_replay.py`),
it puts the model of the caching allocator to the proof. `write` and `read` are the form in which
histories lie among the tests.

    python -m profiler.history SNAPSHOT
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

if __name__ == "__main__":  # on a machine that only measures, msgspec may be missing
    from profiler.plain_structs import install_if_missing

    install_if_missing()

from msgspec import Struct, structs

from estimator.errors import EstimatorError, MalformedDocumentError
from estimator.memory.caching_allocator import (
    AllocatorSettings,
    Block,
    Segment,
)

FORMAT: Final = "allocator-history/v1"
# An address of a history: the number of the segment times this, and the offset in it.
SPAN: Final = 1 << 46
UNIT_BYTES: Final = 512
_HEAD: Final = f'{{"format":"{FORMAT}"'.encode()

Kind = Literal[
    "alloc", "free_requested", "free_completed", "oom",
    "segment_alloc", "segment_free", "segment_map", "segment_unmap",
]  # fmt: skip
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
# A free that is over at once, as nearly all are: one line of the file for two events.
_BOTH: Final = "free"


class Event(NamedTuple):
    """One event; `key` names the block from its allocation on, and is used again afterwards."""

    kind: Kind
    key: int
    size: int
    stream: int
    address: int

    def __str__(self) -> str:
        if self.kind == "oom":
            return f"oom of {self.size} bytes, stream {self.stream}"
        number, offset = divmod(self.address, SPAN)
        return f"{self.kind} of {self.size} bytes at segment {number} + {offset}"


class History(Struct, frozen=True):
    """What happened on one device between two moments, and what it held at each."""

    settings: AllocatorSettings
    start: tuple[Segment, ...]
    events: tuple[Event, ...]
    end: tuple[Segment, ...]


def write(path: Path, history: History, provenance: str) -> None:
    """Write a history as a fixture: lines of JSON, packed with gzip, the same bytes every time."""
    lines = "\n".join(
        json.dumps(each, separators=(",", ":")) for each in _lines(history, provenance)
    )
    path.write_bytes(gzip.compress(f"{lines}\n".encode(), compresslevel=9, mtime=0))


def is_fixture(path: Path) -> bool:
    """Whether a file begins as `write` begins it."""
    try:
        with gzip.open(path) as file:
            return file.read(len(_HEAD)) == _HEAD
    except (OSError, EOFError):
        return False


def read(path: Path) -> History:
    """Read a fixture.

    Raises:
        MalformedDocumentError: the file cannot be read or holds something else.
    """
    try:
        with gzip.open(path) as file:
            lines = [json.loads(line) for line in file]
        return _history(lines)
    except OSError as error:
        raise MalformedDocumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except EstimatorError:
        raise
    except (EOFError, ValueError, TypeError, KeyError, IndexError) as error:
        raise MalformedDocumentError(f"{path} is no {FORMAT}: {error}") from error


def _lines(history: History, provenance: str) -> Iterator[Any]:
    settings = structs.asdict(history.settings)
    yield {"format": FORMAT, "provenance": provenance, "settings": settings}
    yield [_packed(each) for each in history.start]
    yield [_packed(each) for each in history.end]
    events = history.events
    at = 0
    while at < len(events):
        event = events[at]
        after = events[at + 1] if at + 1 < len(events) else None
        if (
            event.kind == "free_requested"
            and after is not None
            and after == event._replace(kind="free_completed")
        ):
            yield [_BOTH, event.key, event.size, event.stream, *_split(event.address)]
            at += 2
        else:
            yield [*event[:4], *_split(event.address)]
            at += 1


def _packed(segment: Segment) -> list[Any]:
    blocks = [
        [each.size_bytes, each.requested_bytes, each.state, each.key] for each in segment.blocks
    ]
    about = [segment.stream, segment.is_small, segment.is_expandable]
    return [*_split(segment.address), *about, blocks]


def _split(address: int) -> tuple[int, int]:
    return address // SPAN, address % SPAN // UNIT_BYTES


def _joined(number: int, units: int) -> int:
    return number * SPAN + units * UNIT_BYTES


def _history(lines: Sequence[Any]) -> History:
    head, start, end, *events = lines
    if head["format"] != FORMAT:
        raise ValueError(f"its format is {head['format']!r}")
    divisions = head["settings"]["roundup_power2_divisions"]
    settings = head["settings"] | {
        "roundup_power2_divisions": tuple(divisions) if isinstance(divisions, list) else divisions
    }
    return History(
        AllocatorSettings(**settings),
        tuple(_unpacked(each) for each in start),
        tuple(event for line in events for event in _events(line)),
        tuple(_unpacked(each) for each in end),
    )


def _unpacked(packed: Sequence[Any]) -> Segment:
    number, units, stream, is_small, is_expandable, about = packed
    begin = at = _joined(number, units)
    blocks = []
    for size, requested, state, key in about:
        blocks.append(Block(at, size, requested, state, key))
        at += size
    return Segment(begin, at - begin, stream, is_small, is_expandable, tuple(blocks))


def _events(line: Sequence[Any]) -> Iterator[Event]:
    kind, key, size, stream, number, units = line
    address = _joined(number, units)
    if kind == _BOTH:
        yield Event("free_requested", key, size, stream, address)
        yield Event("free_completed", key, size, stream, address)
        return
    if kind not in KINDS:
        raise ValueError(f"unknown kind of event {kind!r}")
    yield Event(kind, key, size, stream, address)


if __name__ == "__main__":
    from profiler.history_replay import main

    sys.exit(main(sys.argv[1:]))
