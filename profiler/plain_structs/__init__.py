"""The part of msgspec that our documents and values need, in plain Python.

A machine with a GPU has torch, transformers and PEFT, and often nothing else of ours. Where msgspec
cannot be imported this package takes its name, so that the same request classes answer there. It
is slower and knows less: only what `estimator` and `profiler` use.

It must be in place before anything of `estimator` is imported, because a class is made when its
module is. A measuring entry point therefore begins with

    from profiler.plain_structs import install_if_missing

    install_if_missing()

    from estimator.request import parse_request  # noqa: E402 - after the line above

and nothing else calls it: whoever installs the package has msgspec.
"""

from __future__ import annotations

import importlib
import sys

from profiler.plain_structs import json, structs
from profiler.plain_structs.documents import convert, to_builtins
from profiler.plain_structs.structs import (
    NODEFAULT,
    DecodeError,
    Meta,
    MsgspecError,
    Struct,
    ValidationError,
    field,
)

__all__ = [
    "NODEFAULT", "DecodeError", "Meta", "MsgspecError", "Struct", "ValidationError", "convert",
    "field", "install_if_missing", "json", "structs", "to_builtins",
]  # fmt: skip


def install_if_missing() -> bool:
    """Answer to the name msgspec if nobody else does; return whether that was needed.

    Raises:
        RuntimeError: a module of `estimator` was imported already, so its classes are made.
    """
    try:
        importlib.import_module("msgspec")
    except ImportError:
        pass
    else:
        return False
    early = sorted(name for name in sys.modules if name.split(".")[0] == "estimator")
    if early:
        raise RuntimeError(f"install_if_missing() comes too late, after {early[0]}")
    sys.modules["msgspec"] = sys.modules[__name__]
    sys.modules["msgspec.json"] = json
    sys.modules["msgspec.structs"] = structs
    return True
