"""The catalogue's models and GPUs as lists, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from estimator.render.text import Page, open_page, page_text, printable, table, thin
from estimator.units import gib

if TYPE_CHECKING:
    from estimator.catalog import CatalogModel, Gpu


def models_document(models: Sequence[CatalogModel]) -> str:
    """Return the models as a JSON list."""
    return _json(
        [
            {
                "id": model.id,
                "aliases": list(model.aliases),
                "family": model.family,
                "parameters": model.parameters.computed,
                "parameters_verified": model.parameters.verified,
                "sources": list(model.sources),
            }
            for model in models
        ]
    )


def models_text(models: Sequence[CatalogModel], page: Page) -> str:
    """Return the models as a table."""
    console, rows = open_page(page), table(page, "model", "family", "parameters")
    for model in models:
        rows.add_row(printable(model.id), model.family, thin(model.parameters.computed))
    console.print(rows)
    return page_text(console, page)


def gpus_document(gpus: Sequence[Gpu]) -> str:
    """Return the GPUs as a JSON list."""
    return _json(
        [
            {
                "key": gpu.key,
                "name": gpu.name,
                "aliases": list(gpu.aliases),
                "vendor": gpu.vendor,
                "segment": gpu.segment,
                "nominal_bytes": gpu.nominal_bytes,
                "usable_bytes": gpu.usable_bytes,
                "usable_basis": gpu.usable_basis,
                "usable_source": gpu.usable_source,
            }
            for gpu in gpus
        ]
    )


def gpus_text(gpus: Sequence[Gpu], page: Page) -> str:
    """Return the GPUs as a table: what the box says, and what a process can use."""
    console, rows = open_page(page), table(page, "gpu", "name", "on the box", "usable")
    for gpu in gpus:
        usable = "not known" if gpu.usable_bytes is None else gib(gpu.usable_bytes)
        rows.add_row(gpu.key, gpu.name, gib(gpu.nominal_bytes), usable)
    console.print(rows)
    return page_text(console, page)


def _json(document: Any) -> str:
    return f"{json.dumps(document, indent=2, ensure_ascii=False)}\n"
