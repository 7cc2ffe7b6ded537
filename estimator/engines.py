"""Which engine answers a request: the analytic one here, or one that another package brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from msgspec.structs import replace

from estimator import service
from estimator.catalog import Access, find_model
from estimator.errors import (
    InvalidRequestError,
    MissingDependencyError,
    UnsupportedModelError,
)
from estimator.plugins import ENGINES, load_plugin, missing_dependency, plugin_names
from estimator.request import EstimateRequest
from estimator.result import Result

ANALYTIC: Final = "analytic"
AUTO: Final = "auto"
FALLBACK: Final = "dry-run"

# An engine of another package takes the request and the model's config.json.
EngineCall = Callable[[EstimateRequest, Mapping[str, Any]], Result]


def answer(request: EstimateRequest, *, engine: str, access: Access) -> Result:
    """Return the answer of the named engine; `auto` falls back where the analytic one must refuse.

    Raises:
        EstimatorError: the request is refused, or the engine is unknown or not installed.
    """
    if engine == ANALYTIC:
        return service.estimate(request, access=access)
    if engine != AUTO:
        return _load(engine)(request, _config(request, access))
    try:
        return service.estimate(request, access=access)
    except UnsupportedModelError as refusal:
        return _fall_back(request, access, refusal)


def _fall_back(request: EstimateRequest, access: Access, refusal: UnsupportedModelError) -> Result:
    try:
        result = _load(FALLBACK)(request, _config(request, access))
    except (MissingDependencyError, ImportError) as error:
        missing = missing_dependency(error, FALLBACK) if isinstance(error, ImportError) else error
        raise MissingDependencyError(f"{refusal}; the dry run could answer: {missing}") from None
    note = f"the analytic engine refused ({refusal}), so the dry run answered"
    return replace(result, notes=(note, *result.notes))


def _load(engine: str) -> EngineCall:
    call = load_plugin(ENGINES, engine)
    if call is None:
        known = ", ".join(dict.fromkeys((ANALYTIC, AUTO, *plugin_names(ENGINES))))
        raise InvalidRequestError(f"unknown engine {engine!r}; known: {known}")
    return cast("EngineCall", call)


def _config(request: EstimateRequest, access: Access) -> Mapping[str, Any]:
    if isinstance(request.model, str):
        return find_model(request.model, access).config
    return request.model.config
