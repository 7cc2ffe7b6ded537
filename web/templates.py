"""HTML templates: everything that is put into them is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from estimator import __version__
from estimator.render.reconcile import signed
from estimator.units import gib, printed
from web.chart import component_label

_FOLDER: Final = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["gib"] = gib
    environment.filters["signed"] = signed
    environment.filters["printed"] = printed
    environment.filters["component"] = component_label
    environment.globals["version"] = __version__
    return environment


def render(template: str, **values: Any) -> str:
    """Return the template's HTML with these values in it."""
    return _environment().get_template(template).render(**values)
