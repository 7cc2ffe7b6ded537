"""Writes the rows of the validation matrix anew: `python -m profiler.make_matrix`.

It takes minutes, because the analytic engine is asked about every row. Run it when a lever or a
value is added; rows that stay the same keep their measurements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from estimator.catalog.folder import data_folder
from estimator.errors import EstimatorError
from estimator.units import GiB
from profiler.levers import ANCHORS, LEVERS, anchor, impossible_pairs, request
from profiler.matrices import ROWS, needed
from profiler.pairwise import Pairs

MEMORY: Final = 79 * GiB
GPU: Final = "h100-80gb-sxm5"


def accepts(values: Mapping[str, str]) -> bool:
    """Whether the analytic engine answers a row, and says that it fits."""
    return _accepts(tuple(values.items()))


@lru_cache(maxsize=4096)
def _accepts(values: tuple[tuple[str, str], ...]) -> bool:
    try:
        return needed(request(dict(values)), GPU)["high"] <= MEMORY
    except EstimatorError:
        return False


def rows() -> list[dict[str, str]]:
    """Return rows for all pairs: first without optional libraries, then what these leave."""
    found: list[dict[str, str]] = []
    for optional in (False, True):
        levers = {
            lever: [
                name
                for name, setting in settings.items()
                if optional or set(setting.libraries) <= {"peft"}
            ]
            for lever, settings in LEVERS.items()
        }
        pairs = Pairs(levers, impossible_pairs())
        for values in (*map(anchor, ANCHORS.values()), *found):
            if all(name in levers[lever] for lever, name in values.items()):
                pairs.cover(values)
        found += [dict(row.values) for row in pairs.rows(accepts)]
    return found


def text(found: list[dict[str, str]]) -> str:
    """Return the file: the levers, then a row a line."""
    lines = [json.dumps(list(LEVERS))]
    lines += [json.dumps([row[lever] for lever in LEVERS]) for row in found]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    (data_folder() / ROWS).parent.mkdir(exist_ok=True)
    (data_folder() / ROWS).write_text(text(rows()), encoding="utf-8")
