"""The result as JSON: the same bytes through every door."""

from __future__ import annotations

from typing import Any

import pydantic_core

from estimator.result import Result


def to_json(result: Result) -> bytes:
    """Return the document as UTF-8 JSON with two spaces of indent and a final newline."""
    return pydantic_core.to_json(result, indent=2) + b"\n"


def to_dict(result: Result) -> dict[str, Any]:
    """Return the document as plain dictionaries and lists."""
    document: dict[str, Any] = pydantic_core.to_jsonable_python(result)
    return document
