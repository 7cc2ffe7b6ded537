"""JSON text to documents and back, byte for byte as msgspec writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from profiler.plain_structs.documents import convert, to_builtins
from profiler.plain_structs.structs import DecodeError


def decode(text: bytes | str, type: Any = Any) -> Any:  # noqa: A002 - upstream's argument
    """Return the document in a text, as a value of `type`.

    Raises:
        DecodeError: the text is no JSON.
        ValidationError: the document is no `type`.
        UnicodeDecodeError: the bytes are no UTF-8.
    """
    if isinstance(text, bytes):
        text = text.decode()
    try:
        document = json.loads(text, parse_constant=_refuse_constant, parse_float=_number)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (line {error.lineno} column {error.colno})"
        raise DecodeError(f"JSON is malformed: {reason}") from None
    return convert(document, type)


def encode(value: Any, order: str | None = None) -> bytes:
    """Return a value as one line of JSON; `order` "deterministic" sorts the keys of dictionaries.

    Example:
        >>> encode({"a": (1, 2.0, None)})
        b'{"a":[1,2.0,null]}'
    """
    if order is not None:
        value = _sorted(to_builtins(value))
    return _text(to_builtins(value), None, 0).encode()


def format(text: bytes, indent: int = 2) -> bytes:  # noqa: A001 - the name upstream
    """Return the JSON in `text`, one item a line."""
    return _text(decode(text), indent, 0).encode()


def _refuse_constant(name: str) -> NoReturn:
    raise DecodeError(f"JSON is malformed: {name} is no number")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise DecodeError("Number out of range")
    return value


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _sorted(value[name]) for name in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return value


def _text(value: Any, indent: int | None, depth: int) -> str:
    if isinstance(value, Mapping):
        colon = ":" if indent is None else ": "
        items = (
            f"{json.dumps(str(name), ensure_ascii=False)}{colon}{_text(item, indent, depth + 1)}"
            for name, item in value.items()
        )
        return _enclosed("{", items, "}", indent, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = (_text(item, indent, depth + 1) for item in value)
        return _enclosed("[", items, "]", indent, depth)
    if isinstance(value, float):
        return _float_text(value)
    if value is None or isinstance(value, (bool, int, str)):
        return json.dumps(value, ensure_ascii=False)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def _enclosed(left: str, items: Iterable[str], right: str, indent: int | None, depth: int) -> str:
    if indent is None:
        return left + ",".join(items) + right
    inner = "\n" + " " * indent * (depth + 1)
    text = f",{inner}".join(items)
    return f"{left}{inner}{text}\n{' ' * indent * depth}{right}" if text else left + right


def _float_text(value: float) -> str:
    """Return the shortest digits that read back as `value`; plain from 0.00001 to 1e16."""
    if not math.isfinite(value):
        return "null"
    digits, _, exponent = repr(value).partition("e")
    if not exponent:
        return digits
    if exponent == "-05":
        sign, number = ("-", digits[1:]) if value < 0 else ("", digits)
        return f"{sign}0.0000{number.replace('.', '')}"
    return f"{digits}e{int(exponent)}"
