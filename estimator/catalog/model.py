"""Models: the catalogue's entries, and the places where a model name is looked up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from msgspec import Struct

from estimator.catalog.folder import load
from estimator.config_file import read_config
from estimator.errors import (
    InvalidRequestError,
    MissingDependencyError,
    ModelUnreachableError,
    UnknownModelError,
)
from estimator.hub import cached_config, fetch_config, is_model_id


class Access(Enum):
    """How far a model name may be looked up; each place includes the ones before it."""

    CATALOGUE = 1
    LOCAL = 2
    HUB = 3


class ModelParameters(Struct, frozen=True):
    """How many parameters the model has, tied tensors counted once, and who says so.

    Args:
        computed: what transformers builds from `config`; where it cannot, the sum of the shapes.
        published: the count found elsewhere, raw, even where it counts other things.
        verified: whether `published`, its parts explained, equals `computed`.
        evidence: how the published count was matched.
        source: where the published count is printed.
    """

    computed: int
    published: int | None
    verified: bool
    evidence: str
    source: str | None


class License(Struct, frozen=True):
    """The model's licence; kept only where a file was opened that names it."""

    name: str
    source: str


class CatalogModel(Struct, frozen=True, eq=False):
    """One model of the catalogue.

    Args:
        id: its name on the Hub.
        aliases: other full names of the same model.
        family: its `model_type`.
        config: the keys of its `config.json` that set shapes; a key at the transformers default
            may be absent.
        sources: where `config` comes from.
    """

    id: str
    aliases: tuple[str, ...]
    family: str
    config: Mapping[str, Any]
    parameters: ModelParameters
    license: License | None
    sources: tuple[str, ...]
    notes: tuple[str, ...]


class ModelConfig(Struct, frozen=True, eq=False):
    """What a model name was found to mean.

    Args:
        id: the model's own name, or the path that was given.
        config: its `config.json`.
        origin: the place where it was found, in words.
    """

    id: str
    config: Mapping[str, Any]
    origin: str


@cache
def models() -> tuple[CatalogModel, ...]:
    """Return every model of the catalogue, by family and name."""
    families = sorted({family for family, _ in _index().values()})
    return tuple(
        _catalog_model(model_id, family, row)
        for family in families
        for model_id, row in _family(family).items()
    )


def find_model(name: str, access: Access) -> ModelConfig:
    """Return the configuration that a model name means.

    Looked up in this order, as far as `access` allows: a local folder or `config.json`, the
    catalogue, the Hub cache on this disk, the Hub.

    Raises:
        InvalidRequestError: the name is neither a path nor a model id.
        UnknownModelError: no place has it; the message names the closest known models.
        ModelUnreachableError: the Hub has it but does not give it, or does not answer.
        MalformedDocumentError, InvalidConfigError: it was found, but cannot be read.

    Example:
        >>> find_model("llama-3.1-8b", Access.CATALOGUE).id
        'meta-llama/Llama-3.1-8B'
    """
    if access is not Access.CATALOGUE:
        path = _config_path(name)
        if path is not None:
            return _frozen(name, read_config(path), f"local file {path}")
    if not is_model_id(name):
        raise InvalidRequestError(
            f"{name[:120]!r} is not a model id: a name, or organisation/name, of letters, digits, "
            "'.', '_' and '-'"
        )
    known = _index().get(name.lower())
    if known is not None:
        return _from_catalogue(*known)
    if access is Access.CATALOGUE:
        raise _unknown(
            name,
            "is not in the catalogue",
            'send its configuration instead of its name: {"model": {"config": {...}}}',
        )
    cached = cached_config(name)
    if cached is not None:
        return _frozen(name, cached, "local Hub cache")
    if access is Access.LOCAL:
        raise _unknown(
            name,
            "is neither in the catalogue nor in the local Hub cache",
            "pass --model path/to/config.json, or allow the Hub to be asked",
        )
    return _from_hub(name)


def _config_path(name: str) -> Path | None:
    """Return the `config.json` that a name points to on this disk, if it is a path.

    A bare name is a path only if it is a folder that holds a `config.json`, as transformers has it.
    """
    try:
        path = Path(name).expanduser()
        folder = path.is_dir()
        if name.startswith((".", "~")) or name.endswith(".json") or path.is_absolute():
            return path / "config.json" if folder else path
        return path / "config.json" if folder and (path / "config.json").is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _from_hub(name: str) -> ModelConfig:
    try:
        return _frozen(name, fetch_config(name), "Hugging Face Hub")
    except MissingDependencyError as error:
        raise _unknown(
            name,
            "is neither in the catalogue nor in the local Hub cache",
            f"pass --model path/to/config.json; to ask the Hub: {error}",
        ) from None
    except UnknownModelError as error:
        raise UnknownModelError(f"{error}{_closest(name)}") from None
    except ModelUnreachableError as error:
        raise ModelUnreachableError(f"{error}{_closest(name)}") from None


@cache
def _index() -> dict[str, list[str]]:
    """Return [family, id] under each lower-cased id, alias and short name."""
    index: dict[str, list[str]] = load("models/index.json")
    return index


@cache
def _family(family: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = load(f"models/{family}.json")
    return rows


@cache
def _from_catalogue(family: str, model_id: str) -> ModelConfig:
    return _frozen(model_id, _family(family)[model_id]["config"], "catalogue")


def _catalog_model(model_id: str, family: str, row: dict[str, Any]) -> CatalogModel:
    licence = row.get("license")
    return CatalogModel(
        id=model_id,
        aliases=tuple(row.get("aliases", ())),
        family=family,
        config=MappingProxyType(row["config"]),
        parameters=ModelParameters(**row["parameters"]),
        license=License(**licence) if licence else None,
        sources=tuple(row["sources"]),
        notes=tuple(row.get("notes", ())),
    )


def _frozen(model_id: str, config: dict[str, Any], origin: str) -> ModelConfig:
    return ModelConfig(id=model_id, config=MappingProxyType(config), origin=origin)


def _unknown(name: str, found: str, advice: str) -> UnknownModelError:
    return UnknownModelError(f"{name!r} {found}{_closest(name)}; {advice}")


def _closest(name: str) -> str:
    """Name up to three known models whose names are nearest; a copy's original comes first."""
    # difflib is slow to import and needed only on this path.
    import difflib

    index, wanted = _index(), name.lower()
    last = wanted.rsplit("/", 1)[-1]
    near: Iterable[str] = [
        *([last] if last in index else []),
        *difflib.get_close_matches(wanted, index, n=6),
        *difflib.get_close_matches(last, index, n=6),
    ]
    ids = list(dict.fromkeys(index[key][1] for key in near))[:3]
    return f"; closest known: {', '.join(ids)}" if ids else ""
