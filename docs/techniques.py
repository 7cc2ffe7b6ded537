"""docs/techniques.md: every technique, its source, what it changes, and how it was checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from formulas import table

from estimator.catalog import Access, find_model
from estimator.errors import EstimatorError
from estimator.request import parse_request
from estimator.resolve import resolve

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

FOLDER: Final = Path(__file__).parent / "techniques"
SHARES: Final = Path(__file__).parent / "shares.toml"
CONFORMANCE: Final = Path(__file__).parent / "conformance.md"
_CASE: Final = re.compile(
    r"^\| (?P<name>[^|]+) \| [\d,]+ \| [\d,]+ \| (?P<error>[+-][\d.]+) % \|", re.MULTILINE
)

# The files in the order of the issue: what is trained, how it is stored, updated and computed.
AREAS: Final[dict[str, str]] = {
    "base": "The basis",
    "lora": "The LoRA family",
    "peft": "Other methods of PEFT",
    "methods": "Partial training, adapters, ReFT, training without backward",
    "quantization": "Quantization and precision",
    "optimizers": "Optimizers and their step",
    "low_rank": "Low-rank optimizers and training in blocks",
    "execution": "Checkpointing, attention, packing, compilation",
    "loop": "The training loop",
    "loss": "Losses and kernels",
    "software": "Frameworks with model code of their own",
}

INTRODUCTION: Final = """\
# Techniques

Written by `docs/generate.py` from `docs/techniques/*.toml`; a test opens every request and every
source that is named here, and fails when this page is out of date.

The last column says who judged the bytes: the worst error of the technique's cases in
[conformance.md](conformance.md), where the real library ran beside the formula, or the kernel's
source, where it cannot run without a GPU. A combination that is not here is refused by name.
"""


def page() -> str:
    """Return the whole page."""
    errors = conformance()
    parts = [INTRODUCTION]
    for area, rows in areas().items():
        parts.append(f"## {AREAS[area]}\n")
        parts.append(
            table(
                ("technique", "how to ask for it", "source", "what it changes", "checked by"),
                (
                    (
                        row["name"],
                        f"`{row['request']}`",
                        f"[`{row['source']}`](sources.md#{row['source']}), {row['where']}",
                        _changes(row),
                        _judge(row, errors),
                    )
                    for row in rows
                ),
            )
        )
    parts.append(_shares())
    return "\n".join(parts)


def areas() -> dict[str, list[Mapping[str, Any]]]:
    """Return the techniques of each area, in the order of the page."""
    found = {path.stem: path for path in FOLDER.glob("*.toml")}
    unknown = found.keys() - AREAS.keys()
    if unknown:
        raise ValueError(f"docs/techniques: no heading for {', '.join(sorted(unknown))}")
    return {
        area: tomllib.loads(found[area].read_text(encoding="utf-8"))["technique"]
        for area in AREAS
        if area in found
    }


def techniques() -> Iterator[Mapping[str, Any]]:
    """Yield every technique of the page."""
    for rows in areas().values():
        yield from rows


def conformance() -> dict[str, float]:
    """Return the error of each case of docs/conformance.md [%]."""
    text = CONFORMANCE.read_text(encoding="utf-8")
    return {found["name"].strip(): abs(float(found["error"])) for found in _CASE.finditer(text)}


def _changes(row: Mapping[str, Any]) -> str:
    alias = row.get("same_bytes_as")
    return f"{row['changes']} Same bytes as {alias}." if alias else str(row["changes"])


def _judge(row: Mapping[str, Any], errors: Mapping[str, float]) -> str:
    cases = row.get("cases", [])
    run = [errors[case] for case in cases if case in errors]
    if not run:
        return str(row.get("judge", "not yet run"))
    count = f"{len(run)} case{'s' * (len(run) > 1)}"
    waiting = f", {len(cases) - len(run)} not yet run" if len(run) < len(cases) else ""
    beside = f"; {row['judge']}" if row.get("judge") else ""
    return f"dry run: {count}, at most {max(run):.3f} %{waiting}{beside}"


# -- trained shares ----------------------------------------------------------------------------

SHARES_MODEL: Final = "meta-llama/Llama-2-7b-hf"


def _shares() -> str:
    """Return the trade-off table of the literature, from our own counts."""
    rows = tomllib.loads(SHARES.read_text(encoding="utf-8"))["share"]
    config = find_model(SHARES_MODEL, Access.CATALOGUE).config
    lines = []
    for row in rows:
        request = parse_request({"model": SHARES_MODEL, **json.loads(row["request"])})
        try:
            spec = resolve(request, config, SHARES_MODEL).spec
        except EstimatorError as error:
            raise ValueError(f"{row['name']}: {error}") from None
        trained, total = spec.trainable_parameters(), spec.total_parameters()
        lines.append(
            (
                row["name"],
                f"`{row['request']}`",
                f"{trained:,}".replace(",", " "),
                f"{100 * trained / total:.4g} %",
                row["published"],
            )
        )
    columns = ("method", "settings", "trained", "share", "the literature says")
    return (
        "## Share of trained parameters of a 7 B model\n\n"
        f"Counted for `{SHARES_MODEL}`; the share is of all parameters, added ones included.\n\n"
        + table(columns, lines)
    )
