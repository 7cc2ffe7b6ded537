"""Commands and engines of other packages, found by entry point and loaded only when asked for."""

from __future__ import annotations

import gc
import re
from typing import Any, Final

from estimator.errors import MissingDependencyError

COMMANDS: Final = "vramplan.commands"
ENGINES: Final = "vramplan.engines"
_DISTRIBUTION: Final = "vramplan"
_REQUIREMENT: Final = re.compile(r"([\w.-]+).*;\s*extra\s*==\s*['\"]([\w-]+)['\"]")


def plugin_names(group: str) -> tuple[str, ...]:
    """Return the names that installed packages offer in a group, sorted."""
    # importlib.metadata reads every installed package; the plain estimate never needs it.
    from importlib.metadata import entry_points

    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def load_plugin(group: str, name: str) -> Any | None:
    """Return what a package offers under this name; None if no package does.

    Raises:
        MissingDependencyError: a package does, but something that it imports is not installed.
    """
    from importlib.metadata import entry_points

    entries = tuple(entry_points(group=group, name=name))
    if not entries:
        return None
    # The command line starts without garbage collection; a server or a dry run lives long.
    gc.enable()
    try:
        return entries[0].load()
    except ImportError as error:
        raise missing_dependency(error, name) from error


def missing_dependency(error: ImportError, what: str) -> MissingDependencyError:
    """Return the refusal that names the extra to install."""
    module = (error.name or "").partition(".")[0]
    extra = _extra_that_brings(module)
    if extra is None:
        return MissingDependencyError(f"{what} cannot be loaded: {error}")
    return MissingDependencyError(
        f"{what} needs {module!r}, which is not installed: pip install '{_DISTRIBUTION}[{extra}]'"
    )


def _extra_that_brings(module: str) -> str | None:
    """Return our smallest extra with a requirement of this name, as the metadata lists them."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    members: dict[str, set[str]] = {}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            members.setdefault(match[2], set()).add(match[1].replace("_", "-").lower())
    wanted = module.replace("_", "-").lower()
    # The extra for development brings everything; the others are what a user means.
    bringing = [extra for extra, names in members.items() if wanted in names]
    return min(bringing, key=lambda extra: len(members[extra]), default=None)
