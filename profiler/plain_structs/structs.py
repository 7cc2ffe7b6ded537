"""Struct classes: fields from annotations, closed, frozen where asked, compared by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, NamedTuple, TypeVar, get_type_hints


class MsgspecError(ValueError):
    """What all refusals have in common."""


class DecodeError(MsgspecError):
    """The text is no JSON."""


class ValidationError(DecodeError):
    """The document is not of the type that was asked for."""


class _NoDefault:
    def __repr__(self) -> str:
        return "NODEFAULT"


NODEFAULT: Final = _NoDefault()
_EMPTY: Final[tuple[type, ...]] = (list, dict, set)
_MISSING: Final = object()


class Meta:
    """Bounds of a value, as an annotation holds them; what only describes is kept, not used."""

    def __init__(self, **bounds: Any) -> None:
        self.bounds: Mapping[str, Any] = bounds


class _Made(NamedTuple):
    """A default that is made anew for every instance."""

    make: Callable[[], Any]


def field(*, default: Any = NODEFAULT, default_factory: Any = NODEFAULT) -> Any:
    """Return what a class body writes for a default that is more than a value."""
    return default if default_factory is NODEFAULT else _Made(default_factory)


class StructConfig(NamedTuple):
    """What the class line says; a subclass inherits it."""

    frozen: bool = False
    eq: bool = True
    forbid_unknown_fields: bool = False
    omit_defaults: bool = False
    dict: bool = False
    tag_field: str | None = None
    tag: str | None = None
    cache_hash: bool = False  # changes no value


class FieldInfo(NamedTuple):
    """One field of a struct class."""

    name: str
    encode_name: str
    type: Any
    default: Any
    default_factory: Any


def _annotations(namespace: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the annotations of a class body, wherever this version of Python keeps them."""
    names = ("__annotations__", "__annotate__", "__annotate_func__", "__module__")
    body = {name: namespace[name] for name in names if name in namespace}
    return dict(type("_", (), body).__annotations__)


def _is_field(annotation: Any) -> bool:
    text = annotation if isinstance(annotation, str) else repr(annotation)
    return not text.startswith(("ClassVar", "typing.ClassVar"))


class StructMeta(type):
    """Make the slots, the defaults and the configuration of a struct class."""

    __struct_fields__: tuple[str, ...]
    __struct_config__: StructConfig
    positional_fields: tuple[str, ...]
    defaults_by_field: dict[str, Any]

    def __new__(
        mcs,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        kw_only: bool = False,
        **asked: Any,
    ) -> StructMeta:
        """Return the class; `asked` are the words of its class line."""
        parents = [base for base in bases if isinstance(base, StructMeta)]
        config = _config(name, parents, asked)
        by_name: dict[str, bool] = {}
        defaults: dict[str, Any] = {}
        for parent in reversed(parents):
            for each in parent.__struct_fields__:
                by_name[each] = each not in parent.positional_fields
                defaults[each] = parent.defaults_by_field[each]
        inherited = set(by_name)
        for each, annotation in _annotations(namespace).items():
            if _is_field(annotation):
                by_name[each] = kw_only
                defaults[each] = _default(namespace.pop(each, NODEFAULT))
        positional = tuple(each for each in by_name if not by_name[each])
        fields = positional + tuple(each for each in by_name if by_name[each])
        slots = [each for each in by_name if each not in inherited]
        if config.dict and not any(parent.__struct_config__.dict for parent in parents):
            slots.append("__dict__")
        namespace["__slots__"] = slots
        if config.frozen:
            namespace.setdefault("__setattr__", _refuse_change)
            namespace.setdefault("__delattr__", _refuse_change)
        if not config.eq:
            namespace.setdefault("__eq__", object.__eq__)
            namespace.setdefault("__hash__", object.__hash__)
        made = super().__new__(mcs, name, bases, namespace)
        made.__struct_config__ = config
        made.__struct_fields__ = fields
        made.positional_fields = positional
        made.defaults_by_field = {each: defaults[each] for each in fields}
        return made

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **_: Any) -> None:
        """Take the words of the class line, which `__new__` has read."""
        super().__init__(name, bases, body)


def _config(name: str, parents: list[StructMeta], asked: dict[str, Any]) -> StructConfig:
    config = parents[0].__struct_config__ if parents else StructConfig()
    tag = asked.get("tag", config.tag if "tag_field" not in asked else None)
    config = config._replace(**asked)
    if config.tag_field is not None and ("tag" not in asked):
        # Where only the field is named, the class's own name is the tag.
        tag = name
    return config._replace(tag=tag)


def _default(given: Any) -> Any:
    """Turn an empty container, which every instance gets its own of, into its maker."""
    return _Made(type(given)) if type(given) in _EMPTY else given


def _refuse_change(self: Struct, *_: Any) -> None:
    raise AttributeError(f"immutable type: {type(self).__name__!r}")


class Struct(metaclass=StructMeta):
    """The base of every value and section.

    Example:
        >>> class Point(Struct, frozen=True):
        ...     x: int
        ...     y: int = 2
        >>> Point(1), Point(1) == Point(x=1, y=2)
        (Point(x=1, y=2), True)
    """

    __struct_fields__: ClassVar[tuple[str, ...]]
    __struct_config__: ClassVar[StructConfig]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Set every field, by place, by name or by its default."""
        cls, put = type(self), object.__setattr__
        positional = cls.positional_fields
        if len(args) > len(positional):
            raise TypeError("Extra positional arguments provided")
        for name, value in zip(positional, args, strict=False):
            if name in kwargs:
                raise TypeError(f"Argument {name!r} given by name and position")
            put(self, name, value)
        for name in cls.__struct_fields__[len(args) :]:
            value = kwargs.pop(name, _MISSING)
            if value is _MISSING:
                value = cls.defaults_by_field[name]
                if value is NODEFAULT:
                    raise TypeError(f"Missing required argument {name!r}")
                if type(value) is _Made:
                    value = value.make()
            put(self, name, value)
        if kwargs:
            raise TypeError(f"Unexpected keyword argument {next(iter(kwargs))!r}")
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check what was given; for subclasses."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return astuple(self) == astuple(other)

    def __hash__(self) -> int:
        if not self.__struct_config__.frozen:
            raise TypeError(f"unhashable type: {type(self).__name__!r}")
        return hash((type(self), *astuple(self)))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in asdict(self).items())
        return f"{type(self).__name__}({fields})"


_S = TypeVar("_S", bound=Struct)


def asdict(struct: Struct) -> dict[str, Any]:
    """Return the fields by name, their values as they are."""
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def astuple(struct: Struct) -> tuple[Any, ...]:
    """Return the values of the fields as they are."""
    return tuple([getattr(struct, name) for name in struct.__struct_fields__])


def replace(struct: _S, /, **changes: Any) -> _S:
    """Return a struct with some of its fields changed."""
    for name in changes:
        if name not in struct.__struct_fields__:
            raise TypeError(f"`{type(struct).__name__}` has no field {name!r}")
    return type(struct)(**(asdict(struct) | changes))


def fields(struct: Struct | type[Struct]) -> tuple[FieldInfo, ...]:
    """Return what is known of each field of a class or of its instance."""
    cls = struct if isinstance(struct, type) else type(struct)
    types = get_type_hints(cls, include_extras=True)
    return tuple(_field_info(cls, name, types[name]) for name in cls.__struct_fields__)


def _field_info(cls: type[Struct], name: str, kind: Any) -> FieldInfo:
    default = cls.defaults_by_field[name]
    if isinstance(default, _Made):
        return FieldInfo(name, name, kind, NODEFAULT, default.make)
    return FieldInfo(name, name, kind, default, NODEFAULT)


def is_default(struct: Struct, name: str) -> bool:
    """Whether a field holds what it holds where nobody says otherwise."""
    value, default = getattr(struct, name), type(struct).defaults_by_field[name]
    if isinstance(default, _Made):
        return type(value) is default.make and not value
    return value is default
