"""The result as JSON: the same bytes through every door."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from estimator.result import Result


@cache
def adapter() -> TypeAdapter[Result]:
    """Return the serializer of results; building it takes milliseconds, so it is built once."""
    return TypeAdapter(Result)


def to_json(result: Result) -> bytes:
    """Return the document as UTF-8 JSON with two spaces of indent and a final newline."""
    return adapter().dump_json(result, indent=2) + b"\n"


def to_dict(result: Result) -> dict[str, Any]:
    """Return the document as plain dictionaries and lists."""
    document: dict[str, Any] = adapter().dump_python(result, mode="json")
    return document
