"""Llama-3.1-8B under the usual recipes, each traced and explained.

`python -m tests.conformance.llama_8b` writes `docs/llama-3.1-8b.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from estimator.catalog import Access, find_model
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.units import gib
from tests.conformance.compare import Comparison, compare

MODEL: Final = "meta-llama/Llama-3.1-8B"
PAGE: Final = Path(__file__).parents[2] / "docs" / "llama-3.1-8b.md"
ROWS: Final = 6
_LORA: Final = {"name": "lora", "r": 16, "target_modules": "all-linear"}
_QLORA: Final[dict[str, Any]] = {
    "method": _LORA, "autocast": "bf16", "activation_checkpointing": "full",
}  # fmt: skip
RECIPES: Final[dict[str, dict[str, Any]]] = {
    "full, bf16": {},
    "full, amp_bf16": {"precision": "amp_bf16"},
    "LoRA": {"method": _LORA},
    "LoRA, dropout": {"method": {**_LORA, "lora_dropout": 0.05}},
    "LoRA, checkpointed": {"method": _LORA, "activation_checkpointing": "full"},
    "LoRA, dropout, checkpointed": {
        "method": {**_LORA, "lora_dropout": 0.05}, "activation_checkpointing": "full",
    },
    "QLoRA, k-bit preparation": {**_QLORA, "quantization": {"name": "nf4"}},
    "QLoRA, no k-bit preparation": {
        **_QLORA, "quantization": {"name": "nf4", "prepare_kbit": False},
    },
    "full, bf16, eager": {"attention": "eager"},
    "full, bf16, sdpa, padded": {"padding": True},
}  # fmt: skip


def main() -> None:
    """Trace every recipe and write the page."""
    config = dict(find_model(MODEL, Access.CATALOGUE).config)
    lines = [
        "# Llama-3.1-8B, recipe by recipe",
        "",
        "Micro-batch 1 x 2048, AdamW fused. Each recipe is answered by the analytic engine and by",
        "the dry run; the rows are the largest of what is alive at the peak. Written by",
        "`python -m tests.conformance.llama_8b`.",
    ]
    for name, changes in RECIPES.items():
        document = {"model": {"config": config}, "optimizer": "adamw_torch_fused", **changes}
        lines += _section(name, compare(name, document), document, config)
    PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _section(
    name: str, found: Comparison, document: dict[str, Any], config: dict[str, Any]
) -> list[str]:
    result = answer(parse_request(document), config, name, None)
    rows = sorted(
        (row for part in result.breakdown for row in part.rows), key=lambda row: -row.bytes
    )
    return [
        "",
        f"## {name}",
        "",
        f"Analytic {found.analytic:,} bytes, dry run {found.dry_run:,} bytes "
        f"({100 * found.error:+.3f} %; tensors alone {100 * found.tensor_error:+.4f} %). "
        f"Peak: {result.peak.moment}.",
        "",
        "| at the peak | site | formula | size | source |",
        "|---|---|---|---:|---|",
        *(
            f"| {row.name} | {row.site} | {row.formula} | {gib(row.bytes)} | {row.source} |"
            for row in rows[:ROWS]
        ),
    ]


if __name__ == "__main__":
    main()
