"""Reading a model's `config.json` that a stranger may have written.

The text is data and nothing else: no code that it names is ever loaded.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from estimator.errors import (
    InvalidConfigError,
    MalformedDocumentError,
    UnknownModelError,
    UnsupportedModelError,
)

MAX_CONFIG_BYTES: Final = 1024 * 1024
MAX_CONFIG_DEPTH: Final = 32
MAX_DIGITS: Final = 40

_UTF16_AND_32_MARKS: Final = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def read_config(path: Path) -> dict[str, Any]:
    """Read one `config.json` from disk.

    Raises:
        UnknownModelError: there is no such file, or it may not be read.
        MalformedDocumentError: too large, too deep, not text or not JSON.
        InvalidConfigError: JSON, but not an object.
    """
    try:
        # A pipe or a device would be read for ever: only a regular file is opened.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnknownModelError(f"{path} is not a file; give the path of a config.json")
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnknownModelError(
            f"cannot read {path}: {reason}; give the path of a config.json, or of its folder"
        ) from None
    return parse_config(text, str(path))


def parse_config(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse the text of a `config.json`.

    Args:
        text: the document, as read or as sent.
        where: its place, for the message.

    Raises:
        MalformedDocumentError: too large, too deep, not text or not JSON.
        InvalidConfigError: JSON, but not an object.

    Example:
        >>> parse_config('{"hidden_size": 4096}', "config.json")
        {'hidden_size': 4096}
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise MalformedDocumentError(
            f"{where} is larger than {MAX_CONFIG_BYTES} bytes, which no config.json is; "
            "give the configuration, not the weights or the tokenizer"
        )
    decoded = _decode(text, where) if isinstance(text, bytes) else text
    try:
        config = json.loads(
            decoded, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        raise MalformedDocumentError(
            f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise MalformedDocumentError(
            f"{where} holds a value that is not allowed: {error}"
        ) from None
    if not isinstance(config, dict):
        raise InvalidConfigError(
            f"{where} holds a JSON {_json_type(config)} where a config.json holds an object"
        )
    _check_depth(config, where)
    return config


def asks_for_remote_code(config: Mapping[str, Any]) -> bool:
    """Return whether the config names Python code of its own repository for its architecture.

    Example:
        >>> asks_for_remote_code({"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}})
        True
    """
    auto_map = config.get("auto_map")
    if isinstance(auto_map, Mapping):
        return any(str(name).startswith(("AutoConfig", "AutoModel")) for name in auto_map)
    return bool(auto_map) or config.get("trust_remote_code") is True


def remote_code_refusal(config: Mapping[str, Any], where: str) -> UnsupportedModelError:
    """Return the refusal of an architecture that exists only as code in the model's repository.

    The caller decides: a config may name remote code for an architecture that we know by name
    (`model_type`), and then its code is simply not needed.
    """
    return UnsupportedModelError(
        f"{where}: model_type {config.get('model_type')!r} is defined by Python code in the "
        "model's own repository (auto_map), and remote code is never run here; use a model whose "
        "architecture is part of transformers"
    )


def _decode(text: bytes, where: str) -> str:
    if text.startswith(_UTF16_AND_32_MARKS):
        raise MalformedDocumentError(f"{where} is UTF-16 or UTF-32 text; save it as UTF-8")
    if b"\x00" in text:
        raise MalformedDocumentError(f"{where} is a binary file; a config.json is JSON text")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedDocumentError(
            f"{where} is not UTF-8 text (byte {error.start}); a config.json is JSON text"
        ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


def _whole(digits: str) -> int:
    # Reading an integer takes time quadratic in its digits; some versions of Python refuse it.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(config: dict[str, Any], where: str) -> None:
    """Refuse a document nested deeper than any real one, level by level and without recursion."""
    level: list[Any] = [config]
    for _ in range(MAX_CONFIG_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _too_deep(where)


def _too_deep(where: str) -> MalformedDocumentError:
    return MalformedDocumentError(f"{where} is nested deeper than {MAX_CONFIG_DEPTH} levels")


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "number"
