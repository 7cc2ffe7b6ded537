"""The result as JSON: the same bytes through every door."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from estimator.result import Result


def to_json(result: Struct) -> bytes:
    """Return the document as UTF-8 JSON with two spaces of indent and a final newline."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"


def to_dict(result: Result) -> dict[str, Any]:
    """Return the document as plain dictionaries and lists."""
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(result))
    return document
