"""A part of the request document: frozen, strictly typed, and closed to unknown fields."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
SizeBytes = Annotated[int, Meta(ge=0, le=2**60)]
Names = tuple[str, ...]


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON object of the request; its fields, bounds and defaults are those of the class."""

    def to_dict(self) -> dict[str, Any]:
        """Return the section as JSON would hold it, defaults written out."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document


class Kind(Section, frozen=True, tag_field="name"):
    """A section that exists in several kinds; its `name` in the document says which."""

    def __hash__(self) -> int:
        """Hash what JSON would hold: a knob may be a dictionary."""
        return hash(msgspec.json.encode(self, order="deterministic"))

    @property
    def name(self) -> str:
        """The name of this kind in the document."""
        return str(self.__struct_config__.tag)
