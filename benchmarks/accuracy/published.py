"""The published rows of `data/published/`, as they were read from their sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PUBLISHED: Final = ROOT / "data" / "published"
LEAST_COMPLETENESS: Final = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One published run; `data/published/README.md` says what each field means."""

    id: str
    source_group: str
    model: str
    method: str
    method_detail: Mapping[str, Any]
    weights_dtype: str | None
    precision: str | None
    optimizer: str | None
    optimizer_in_backward: bool
    micro_batch_size: int | None
    seq_len: int | None
    seq_mode: str | None
    grad_accum: int | None
    activation_checkpointing: str | None
    attention_impl: str | None
    loss_impl: str | None
    compile: bool
    parallelism: Mapping[str, Any]
    framework: str
    gpu: str | None
    metric: str
    value_gib: float | None
    alt_metrics: Mapping[str, float] | None
    kind: str
    suspect: bool
    completeness: int

    @property
    def scored(self) -> bool:
        """Whether the row counts in the summary."""
        return (
            self.kind == "peak_memory"
            and self.completeness >= LEAST_COMPLETENESS
            and not self.suspect
        )


def measured() -> tuple[Row, ...]:
    """Return every published measurement."""
    return _read(PUBLISHED / "measured.jsonl")


def out_of_memory() -> tuple[Row, ...]:
    """Return every run that was published as not fitting."""
    return _read(PUBLISHED / "out_of_memory.jsonl")


@cache
def sample_lengths(dataset: str) -> tuple[int, ...]:
    """Return the lengths of samples of a data set that published runs trained on [tokens].

    Args:
        dataset: its name on the Hugging Face Hub.
    """
    document = json.loads((PUBLISHED / "sample_lengths.json").read_text(encoding="utf-8"))
    return tuple(document["datasets"][dataset]["lengths"])


def _read(path: Path) -> tuple[Row, ...]:
    names = [each.name for each in fields(Row)]
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(Row(**{name: row[name] for name in names}) for row in map(json.loads, lines))
