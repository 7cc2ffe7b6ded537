"""The page's form: a URL query becomes a request document, and a request becomes a URL query.

Names, types, choices, defaults and hints are those of the command line's flags, which are read from
the request's own models: `?model=gpt2&gpu=rtx-4090` says what `--model gpt2 --gpu rtx-4090` says.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, get_origin
from urllib.parse import urlencode

import click

from estimator.config_file import parse_config
from estimator.errors import InvalidRequestError
from estimator.flags import FLAG_GROUPS, FLAGS, OrNone, overlay, request_fields, request_options
from estimator.request import (
    FP8_LIBRARIES,
    METHOD_ALIASES,
    METHODS,
    QUANTIZATIONS,
    expand_short_forms,
)
from estimator.section import Kind
from estimator.techniques.execution import CHECKPOINTING
from estimator.techniques.optimizers import OPTIMIZERS
from estimator.techniques.qat import Torchao as Qat

CONFIG: Final = "config"
# A query is part of the address: servers and browsers refuse addresses much longer than this.
MAX_CONFIG_CHARACTERS: Final = 16_000

# The fields that stand at the top of the page; all others follow under their own headings.
FIRST: Final = (
    "/model", "/hardware/gpu", "/method/name", "/method/r", "/precision", "/optimizer/name",
    "/micro_batch_size", "/seq_len", "/gradient_accumulation_steps", "/padding",
    "/packing", "/activation_checkpointing", "/attention",
)  # fmt: skip

# Fields that are any word to the parser, and the table that says which words have an answer.
_TABLES: Final[dict[str, tuple[str, ...]]] = {
    "/optimizer/name": tuple(OPTIMIZERS),
    "/activation_checkpointing": tuple(CHECKPOINTING),
}

# Where a flag's own text speaks of the machine that the command line runs on.
_HINTS: Final = {
    "/model": "Name in the catalogue, in any case; another model: paste its config.json below.",
    "/hardware/gpu": "The memory is what the driver offers.",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One entry of a menu."""

    value: str
    label: str


@dataclass(frozen=True, slots=True)
class Control:
    """One field of the form.

    Args:
        name: its name in the query.
        default: what the request holds when the query does not name it.
        methods: the methods that have this field; empty for a field that all have.
    """

    name: str
    pointer: str
    label: str
    hint: str
    kind: Literal["text", "menu", "number"]
    default: str
    choices: tuple[Choice, ...]
    methods: tuple[str, ...]


@cache
def controls() -> dict[str, Control]:
    """Return every control of the form by its JSON pointer."""
    return {
        flag.pointer: _control(flag.pointer, flag.option, flag.help, option)
        for flag, option in zip(FLAGS, request_options(), strict=True)
    }


@cache
def groups() -> dict[str, tuple[Control, ...]]:
    """Return the controls that do not stand at the top of the page, under the CLI's headings."""
    found = {
        heading: tuple(controls()[flag.pointer] for flag in flags if flag.pointer not in FIRST)
        for heading, flags in FLAG_GROUPS.items()
    }
    return {heading: members for heading, members in found.items() if members}


def _control(pointer: str, option_name: str, text: str, option: click.Option) -> Control:
    kind, nullable = option.type, False
    if isinstance(kind, OrNone):
        kind, nullable = kind.inner, True
    field = request_fields()[pointer]
    if pointer in _TABLES:
        choices = tuple(Choice(word, word.replace("_", " ")) for word in _TABLES[pointer])
    elif isinstance(kind, click.Choice):
        words = ["none"] * nullable + [str(word) for word in kind.choices]
        choices = tuple(Choice(word, word.replace("_", " ")) for word in words)
    elif option.is_bool_flag:
        choices = (Choice("false", "no"), Choice("true", "yes"))
    else:
        choices = ()
    is_number = isinstance(kind, (click.types.IntParamType, click.types.FloatParamType))
    return Control(
        name=option_name.removeprefix("--"),
        pointer=pointer,
        label=option_name.removeprefix("--").replace("-", " "),
        hint=_HINTS.get(pointer, text),
        kind="menu" if choices else "number" if is_number and not nullable else "text",
        default="" if pointer == "/model" else _text(field.default),
        choices=choices,
        methods=_methods_with(pointer),
    )


@cache
def _method_fields() -> dict[str, frozenset[str]]:
    """Return the fields of each method, under its name and under its aliases."""
    fields = {kind().name: frozenset(kind.__struct_fields__) for kind in METHODS}
    return fields | {alias: fields[meant.method] for alias, meant in METHOD_ALIASES.items()}


def _methods_with(pointer: str) -> tuple[str, ...]:
    _, section, *rest = pointer.split("/")
    if section != "method" or rest == ["name"]:
        return ()
    return tuple(name for name, fields in _method_fields().items() if rest[0] in fields)


def read(query: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the request document that a query means; an empty field is one left out.

    Raises:
        InvalidRequestError: a name is unknown, or a value has the wrong type.
        MalformedDocumentError: the pasted configuration cannot be read.
    """
    values = {name: value for name, value in query if value.strip()}
    config = values.pop(CONFIG, None)
    by_name = {control.name: control for control in controls().values()}
    for name in values:
        if name not in by_name:
            raise _unknown_name(name, by_name)
    given = {
        control.pointer: _value(control, values[control.name])
        for control in by_name.values()
        if control.name in values
    }
    document = overlay({}, _that_apply(given))
    if config is not None:
        document["model"] = {"config": _config(config)}
    return document


def write(document: Mapping[str, Any]) -> str:
    """Return the query of a request document; what equals its default is left out."""
    pairs = [
        (control.name, text)
        for pointer, value in _leaves(_with_alias(expand_short_forms(dict(document))), "")
        if (control := controls().get(pointer)) is not None
        and (text := _text(value, pointer)) != control.default
    ]
    return urlencode(pairs)


def changed(query: Iterable[tuple[str, str]], change: Mapping[str, Any]) -> str:
    """Return the query with a suggestion's change in it; a pasted configuration stays."""
    pairs = list(query)
    document = _merged(expand_short_forms(read(pairs)), expand_short_forms(dict(change)))
    config = [(name, value) for name, value in pairs if name == CONFIG and value.strip()]
    return "&".join(filter(None, (write(document), urlencode(config))))


def command(query: Iterable[tuple[str, str]]) -> str:
    """Return the command line that asks the same."""
    words = ["estimate"]
    for name, value in query:
        if name == CONFIG:
            words += ["--model", "path/to/config.json"]
            continue
        control = next(control for control in controls().values() if control.name == name)
        if value == control.default or not value.strip():
            continue
        if {choice.value for choice in control.choices} == {"false", "true"}:
            words.append(f"--{name}" if value == "true" else f"--no-{name}")
        else:
            words += [f"--{name}", value]
    return shlex.join(words)


def _value(control: Control, text: str) -> Any:
    (option,) = (
        option
        for flag, option in zip(FLAGS, request_options(), strict=True)
        if flag.pointer == control.pointer
    )
    try:
        return option.type.convert(text.strip(), None, None)
    except click.UsageError as error:
        why = error.message
        raise InvalidRequestError(f"{control.label}: {why}", ((control.pointer, why),)) from None


def _that_apply(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the fields of a method or a quantization that was not chosen.

    A form without JavaScript sends them all, and the request refuses what a method does not have.
    """
    method = given.get("/method/name", controls()["/method/name"].default)
    alias = METHOD_ALIASES.get(method)
    quantization = given.get("/quantization/name") or (alias and alias.quantization)
    of_kinds = {
        "quantization": _fields(QUANTIZATIONS).get(str(quantization), frozenset()),
        "fp8": _fields(FP8_LIBRARIES).get(str(given.get("/fp8/name")), frozenset()),
        "qat": _fields((Qat,)).get(str(given.get("/qat/name")), frozenset()),
    }
    kept = {}
    for pointer, value in given.items():
        section, field = pointer.strip("/").partition("/")[::2]
        applies = method in controls()[pointer].methods or not controls()[pointer].methods
        if applies and (section not in of_kinds or field in of_kinds[section]):
            kept[pointer] = value
    return kept


@cache
def _fields(kinds: tuple[type[Kind], ...]) -> dict[str, frozenset[str]]:
    """Return the fields of each kind of a section, its name among them."""
    return {
        str(kind.__struct_config__.tag): frozenset(kind.__struct_fields__) | {"name"}
        for kind in kinds
    }


def _config(text: str) -> dict[str, Any]:
    if len(text) > MAX_CONFIG_CHARACTERS:
        why = (
            f"larger than the {MAX_CONFIG_CHARACTERS} characters that an address holds; "
            "send it to POST /v1/estimate instead"
        )
        raise InvalidRequestError(f"config: {why}", (("/model/config", why),))
    return parse_config(text, "config.json")


def _unknown_name(name: str, known: Iterable[str]) -> InvalidRequestError:
    close = difflib.get_close_matches(name, list(known), n=1)
    why = f"unknown field {name[:100]!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    return InvalidRequestError(why, ((f"/{name[:100]}", why),))


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, item in value.items():
        pointer = f"{prefix}/{name}"
        if isinstance(item, Mapping) and not _is_dictionary(pointer):
            yield from _leaves(item, pointer)
        else:
            yield pointer, item


def _is_dictionary(pointer: str) -> bool:
    """Whether a field is a dictionary itself, not a section with fields."""
    field = request_fields().get(pointer)
    return field is not None and any(get_origin(kind) is dict for kind in field.types)


def _with_alias(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with a method and its quantization under the one name for both."""
    method, quantization = document.get("method"), document.get("quantization")
    if not isinstance(method, dict) or not isinstance(quantization, dict):
        return document
    for alias, meant in METHOD_ALIASES.items():
        said = meant.method, meant.quantization
        if not meant.knobs and (method.get("name"), quantization.get("name")) == said:
            rest = {name: value for name, value in quantization.items() if name != "name"}
            return {**document, "method": {**method, "name": alias}, "quantization": rest}
    return document


def _merged(document: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with the change in it; a section of another kind replaces the old one."""
    out = dict(document)
    for name, value in change.items():
        old = out.get(name)
        out[name] = value
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            kind = old.get("name")
            out[name] = _merged(old, value) if value.get("name", kind) == kind else value
    return out


def _text(value: Any, pointer: str = "") -> str:
    if value is None:
        return "none"
    if pointer.endswith("_bytes") and value:
        return f"{value}B"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value) if value else ""
    return str(value)
