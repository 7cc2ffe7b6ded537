"""The catalogue as the API lists it: what can be asked for, by which name."""

from __future__ import annotations

from functools import cache

from msgspec import Struct

from estimator.catalog import CatalogModel, Gpu, gpus, models


class ModelEntry(Struct, frozen=True):
    """A model that the catalogue knows."""

    id: str
    aliases: tuple[str, ...]
    family: str
    parameters: int
    parameters_verified: bool
    sources: tuple[str, ...]


class ModelList(Struct, frozen=True):
    """The models that match a search; `total` counts them before `limit` is applied."""

    total: int
    models: tuple[ModelEntry, ...]


class GpuEntry(Struct, frozen=True):
    """A GPU that the catalogue knows, and the memory that its driver really offers."""

    key: str
    name: str
    aliases: tuple[str, ...]
    vendor: str
    segment: str
    nominal_bytes: int
    usable_bytes: int | None
    usable_basis: str | None
    usable_source: str


class GpuList(Struct, frozen=True):
    """Every GPU of the catalogue."""

    total: int
    gpus: tuple[GpuEntry, ...]


def model_list(query: str, limit: int) -> ModelList:
    """Return the models whose name holds every word of the query, in any case."""
    words = query.lower().split()
    found = [entry for entry, text in _searchable() if all(word in text for word in words)]
    return ModelList(total=len(found), models=tuple(found[:limit]))


@cache
def gpu_list() -> GpuList:
    """Return every GPU, in the catalogue's order."""
    entries = tuple(_gpu_entry(gpu) for gpu in gpus())
    return GpuList(total=len(entries), gpus=entries)


@cache
def _searchable() -> tuple[tuple[ModelEntry, str], ...]:
    return tuple(
        (_model_entry(model), " ".join((model.id, model.family, *model.aliases)).lower())
        for model in models()
    )


def _model_entry(model: CatalogModel) -> ModelEntry:
    return ModelEntry(
        id=model.id,
        aliases=model.aliases,
        family=model.family,
        parameters=model.parameters.computed,
        parameters_verified=model.parameters.verified,
        sources=model.sources,
    )


def _gpu_entry(gpu: Gpu) -> GpuEntry:
    return GpuEntry(
        key=gpu.key,
        name=gpu.name,
        aliases=gpu.aliases,
        vendor=gpu.vendor,
        segment=gpu.segment,
        nominal_bytes=gpu.nominal_bytes,
        usable_bytes=gpu.usable_bytes,
        usable_basis=gpu.usable_basis,
        usable_source=gpu.usable_source,
    )
