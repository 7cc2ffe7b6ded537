"""plotly.js as the installed `plotly` package ships it; no third-party file is copied here."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Final

_STYLE_LITERAL: Final = re.compile(r"\.textContent='([^'\\]*)'")


@cache
def script() -> bytes:
    """Return the bundle's JavaScript."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_bytes()


@cache
def compressed_script() -> bytes:
    """Return the bundle gzipped: 4.8 MB become 1.5 MB, once per process."""
    return gzip.compress(script(), compresslevel=6, mtime=0)


@cache
def path() -> str:
    """Return where the bundle is served; the version in it lets a browser keep it for ever."""
    return f"/vendor/plotly-{version('plotly')}.min.js"


@cache
def style_hashes() -> tuple[str, ...]:
    """Return the CSP hashes of the style sheets that the bundle inserts when it loads.

    The full bundle carries a map library which inserts its constant style sheet even when no map
    is drawn. Allowing that text by its hash is stricter than allowing inline styles.
    """
    literals = _STYLE_LITERAL.findall(script().decode())
    digests = (hashlib.sha256(literal.encode()).digest() for literal in literals)
    return tuple(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
