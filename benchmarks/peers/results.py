"""`results.jsonl`: what every peer answered, one line for each peer and row, in order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from profiler.whole_file import write_whole

RESULTS: Final = Path(__file__).with_name("results.jsonl")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one peer says about one row.

    Args:
        bytes: its figure, or None where `reason` says why there is none.
        allocated_bytes: the part of it that the peer says is the allocator's, where it says so.
    """

    peer: str
    version: str
    id: str
    bytes: int | None = None
    allocated_bytes: int | None = None
    reason: str | None = None


def read(path: Path = RESULTS) -> dict[tuple[str, str], Answer]:
    """Return every answer by peer and row."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [Answer(**json.loads(line)) for line in lines]
    return {(each.peer, each.id): each for each in found}


def put(peer: str, answers: Iterable[Answer], path: Path = RESULTS) -> None:
    """Write a peer's answers in place of those that the file has of it."""
    others = [each for each in read(path).values() if each.peer != peer]
    ordered = sorted([*others, *answers], key=lambda each: (each.peer, each.id))
    text = "".join(json.dumps(asdict(each)) + "\n" for each in ordered)
    write_whole(path, text.encode())
