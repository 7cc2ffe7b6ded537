"""Modules in place of libraries that cannot be imported here, for as long as somebody asks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_ABSENT: Final = object()


def module(name: str, **members: object) -> ModuleType:
    """Return a module that says where it is from, so that a search for it finds it."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    return made


@contextlib.contextmanager
def imported(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let these modules be found by import; what else is imported meanwhile stays imported.

    `mock.patch.dict(sys.modules)` would throw that out again, and a library that is imported a
    second time no longer knows its own classes.
    """
    before = {name: sys.modules.get(name, _ABSENT) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, found in before.items():
            if isinstance(found, ModuleType):
                sys.modules[name] = found
            else:
                sys.modules.pop(name, None)
