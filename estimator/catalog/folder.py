"""Where the catalogue's files are: in a checkout, an editable install or a wheel."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from estimator.errors import CannotEstimateError

_PACKAGE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def data_folder() -> Path:
    """Return the folder that holds `gpus.json` and `models/`.

    A wheel carries it as `estimator/_data`; a checkout and an editable install as `data/` beside
    the package. The wheel's place comes first, because `data/` beside an installed package is
    somebody else's.

    Raises:
        CannotEstimateError: neither place has it, so the installation is broken.
    """
    for folder in (_PACKAGE / "_data", _PACKAGE.parent / "data"):
        if (folder / "models" / "index.json").is_file():
            return folder
    raise CannotEstimateError(
        f"the catalogue is missing from {_PACKAGE}; install vramplan again to repair it"
    )


def load(name: str) -> Any:
    """Parse one JSON file of the catalogue."""
    return json.loads((data_folder() / name).read_bytes())
