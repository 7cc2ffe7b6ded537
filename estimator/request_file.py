"""Read a request from a file or from standard input: JSON or YAML, small, shallow and plain."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from estimator.errors import MalformedDocumentError
from estimator.request import MAX_REQUEST_BYTES

MAX_DEPTH: Final = 64


def read_request_document(path: str) -> dict[str, Any]:
    """Return the object that the file holds; `-` is standard input.

    A name that ends in .yaml or .yml is YAML, one that ends in .json is JSON; anything else is
    JSON when it starts with a brace and YAML when it does not.

    Raises:
        MalformedDocumentError: the file cannot be read, or is not one small JSON or YAML object.
    """
    name = "standard input" if path == "-" else path
    text = _text(_content(path, name), name)
    suffix = Path(path).suffix.lower()
    is_yaml = suffix in (".yaml", ".yml") or (suffix != ".json" and text.lstrip()[:1] not in "{[")
    document = _from_yaml(text, name) if is_yaml else _from_json(text, name)
    if not isinstance(document, dict):
        raise MalformedDocumentError(
            f"{name} holds {_kind(document)} where a request needs an object with named fields"
        )
    return document


def _content(path: str, name: str) -> bytes:
    """Read one byte more than is allowed, so that an endless file is no trouble."""
    try:
        if path == "-":
            if sys.stdin is None:
                raise ValueError("it is closed")
            content = sys.stdin.buffer.read(MAX_REQUEST_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(MAX_REQUEST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MalformedDocumentError(f"cannot read {name}: {reason}") from None
    if len(content) > MAX_REQUEST_BYTES:
        raise MalformedDocumentError(
            f"{name} is larger than {MAX_REQUEST_BYTES} bytes; a request describes one run"
        )
    return content


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MalformedDocumentError(f"{name} is not UTF-8 text") from None
    if "\0" in text:
        raise MalformedDocumentError(f"{name} is a binary file, not JSON or YAML")
    if not text.strip():
        raise MalformedDocumentError(f"{name} is empty; the shortest request names a model")
    return text


def _from_json(text: str, name: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise MalformedDocumentError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise MalformedDocumentError(f"{name} is not JSON: {error}") from None


def _from_yaml(text: str, name: str) -> Any:
    # Imported here: a request in JSON, or none at all, must not pay for the YAML reader.
    import yaml

    try:
        # libyaml reads a megabyte in well under a second; the reader in Python takes ten.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        _refuse_costly(yaml.parse(text, Loader=loader), yaml, name)
        return yaml.load(text, Loader=loader)  # noqa: S506  both loaders are the safe ones
    except RecursionError:
        raise MalformedDocumentError(f"{name} is nested too deeply") from None
    # The constructors of dates and numbers raise plain ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise MalformedDocumentError(f"{name} is not YAML: {_reason(error)}") from None


def _refuse_costly(events: Iterable[Any], yaml: Any, name: str) -> None:
    """Refuse aliases, which can stand for a document of any size, and deep nesting."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise MalformedDocumentError(
                f"{name} uses the YAML alias *{event.anchor}; write the value out"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise MalformedDocumentError(f"{name} is nested deeper than {MAX_DEPTH} levels")


def _reason(error: Exception) -> str:
    """Say what is wrong and where, without PyYAML's drawing of the line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem:
        return " ".join(str(error).split())
    return f"{problem}, line {mark.line + 1}" if mark else str(problem)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", type(None): "nothing", bool: "a truth value"}
    return names.get(type(value), "a number")
