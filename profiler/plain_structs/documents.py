"""A decoded document checked against a type, and back; refused in the words that msgspec uses."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin
from typing import get_type_hints as hints

from profiler.plain_structs.structs import NODEFAULT, Meta, Struct, ValidationError, is_default

_ORDER: Final = ("bool", "int", "float", "str", "object", "array", "null")


class _Member(NamedTuple):
    """One of the types that a place may hold: what JSON calls it, and what it is here."""

    json: str
    kind: Any
    bounds: tuple[tuple[str, Any], ...]


def convert(document: Any, type: Any) -> Any:  # noqa: A002 - the name of the argument upstream
    """Return the document as a value of `type`.

    Raises:
        ValidationError: the first place that does not fit, with its path.

    Example:
        >>> convert({"a": [1, 2]}, dict[str, tuple[int, ...]])
        {'a': (1, 2)}
    """
    return _convert(document, type, "")


def to_builtins(value: Any) -> Any:
    """Return what JSON would hold: structs as dictionaries, their tag first."""
    if isinstance(value, Struct):
        config = value.__struct_config__
        out = {} if config.tag_field is None else {config.tag_field: config.tag}
        for name in value.__struct_fields__:
            if not (config.omit_defaults and is_default(value, name)):
                out[name] = to_builtins(getattr(value, name))
        return out
    if isinstance(value, Mapping):
        return {name: to_builtins(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        made: Any = tuple if isinstance(value, tuple) else list
        return made(to_builtins(item) for item in value)
    return value


@cache
def _members(kind: Any) -> tuple[_Member, ...]:
    """Return the types that an annotation allows."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *metas = get_args(kind)
        bounds = tuple(
            bound for meta in metas if isinstance(meta, Meta) for bound in meta.bounds.items()
        )
        return tuple(each._replace(bounds=each.bounds + bounds) for each in _members(inner))
    if origin in (Union, types.UnionType):
        return tuple(member for each in get_args(kind) for member in _members(each))
    return (_Member(_json_name(kind, origin), kind, ()),)


def _json_name(kind: Any, origin: Any) -> str:
    plain = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null", None: "null"}
    if kind is Any:
        return "any"
    if origin is Literal:
        return "str"
    if origin is tuple or origin is list:
        return "array"
    if origin is dict or kind is dict or _is_struct(kind):
        return "object"
    if kind in plain:
        return plain[kind]
    raise TypeError(f"{kind!r} is not known here; install msgspec, which knows it")


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


@cache
def _types(kind: type[Struct]) -> dict[str, Any]:
    return hints(kind, include_extras=True)


def _json_kind(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    if isinstance(value, (Mapping, Struct)):
        return "object"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "array"
    return type(value).__name__


def _refuse(detail: str, path: str) -> ValidationError:
    return ValidationError(f"{detail} - at `${path}`" if path else detail)


def _convert(value: Any, kind: Any, path: str) -> Any:
    members, found = _members(kind), _json_kind(value)
    fitting = [each for each in members if each.json in (found, "any")]
    if not fitting and found == "int":
        fitting = [each for each in members if each.json == "float"]
    if not fitting:
        allowed = sorted({each.json for each in members}, key=_ORDER.index)
        raise _refuse(f"Expected `{' | '.join(allowed)}`, got `{found}`", path)
    member = fitting[0]
    if member.json == "any" or found in ("null", "bool"):
        return value
    if found == "object":
        return _object(value, [each.kind for each in fitting], path)
    if found == "array":
        inner = get_args(member.kind)[0]
        items = [_convert(each, inner, f"{path}[{at}]") for at, each in enumerate(value)]
        return items if get_origin(member.kind) is list else tuple(items)
    if member.json == "float":
        value = float(value)
    literals = [each for each in fitting if get_origin(each.kind) is Literal]
    if literals and not any(value in get_args(each.kind) for each in literals):
        raise _refuse(f"Invalid enum value {value!r}", path)
    _check_bounds(value, member, path)
    return value


def _check_bounds(value: Any, member: _Member, path: str) -> None:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    holds = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
        "min_length": lambda bound: len(value) >= bound,
        "max_length": lambda bound: len(value) <= bound,
    }
    for name, bound in member.bounds:
        if name not in holds or holds[name](bound):
            continue
        shown = float(bound) if member.json == "float" else bound
        sign = signs.get(name) or f"of length {'>=' if name == 'min_length' else '<='}"
        raise _refuse(f"Expected `{member.json}` {sign} {shown}", path)


def _object(value: Any, kinds: list[Any], path: str) -> Any:
    """Return a dictionary with its values converted, or the struct that it describes."""
    structs = [kind for kind in kinds if _is_struct(kind)]
    if isinstance(value, Struct):
        if type(value) not in structs:
            raise _refuse(f"Expected `object`, got `{type(value).__name__}`", path)
        return value
    for key in value:
        if not isinstance(key, str):
            raise ValidationError(
                f"Expected `str`, got `{_json_kind(key)}` - at `key` in `${path}`"
            )
    if structs:
        return _struct(value, _tagged(value, structs, path), path)
    inner = (get_args(kinds[0]) or (str, Any))[1]
    return {name: _convert(item, inner, f"{path}[...]") for name, item in value.items()}


def _tagged(value: Mapping[str, Any], kinds: list[type[Struct]], path: str) -> type[Struct]:
    """Return the class that the tag of a document names."""
    name = kinds[0].__struct_config__.tag_field
    if name is None:
        return kinds[0]
    if name not in value:
        if len(kinds) == 1:
            return kinds[0]
        raise _refuse(f"Object missing required field `{name}`", path)
    tag = _convert(value[name], str, f"{path}.{name}")
    for kind in kinds:
        if kind.__struct_config__.tag == tag:
            return kind
    raise _refuse(f"Invalid value {tag!r}", f"{path}.{name}")


def _struct(value: Mapping[str, Any], kind: type[Struct], path: str) -> Struct:
    config, types_ = kind.__struct_config__, _types(kind)
    given = {}
    for name, item in value.items():
        if name in kind.__struct_fields__:
            given[name] = _convert(item, types_[name], f"{path}.{name}")
        elif name != config.tag_field and config.forbid_unknown_fields:
            raise _refuse(f"Object contains unknown field `{name}`", path)
    for name, default in kind.defaults_by_field.items():
        if default is NODEFAULT and name not in given:
            raise _refuse(f"Object missing required field `{name}`", path)
    return kind(**given)
