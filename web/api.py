"""The JSON API: parse the document, ask the estimator, send its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from estimator import __version__
from estimator.catalog import find_gpu, gpus, models
from estimator.errors import EstimatorError
from estimator.measurement import parse_measurement
from estimator.reconcile import Reconciliation
from estimator.render.document import to_json
from estimator.request import parse_request
from estimator.result import Result
from web import problems
from web.door import answer, explain
from web.listing import GpuList, ModelList, gpu_list, model_list
from web.settings import Settings
from web.shield import Metrics

MAX_LISTED: Final = 1000
REQUEST_SCHEMA: Final = "#/components/schemas/EstimateRequest"
MEASUREMENT_SCHEMA: Final = "#/components/schemas/Measurement"
# How much of a body that is too large is read and thrown away. A server that answers and hangs
# up in the middle of an upload resets the connection, and the client never sees the answer.
_MAX_DISCARDED_BYTES: Final = 64 * 1024 * 1024


class Version(Struct, frozen=True):
    """What is running."""

    name: str
    version: str
    result_schema: str


class Health(Struct, frozen=True):
    """The process answers."""

    status: str


ANSWERS: Final[tuple[type[Struct], ...]] = (
    Result,
    Reconciliation,
    ModelList,
    GpuList,
    Version,
    Health,
)
"""The documents that the routes answer with."""


def documented(answer: type[Struct], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's entries for a route's answer and for the problems it may answer with."""
    answered = {"schema": {"$ref": f"#/components/schemas/{answer.__name__}"}}
    success = {"description": "Successful Response", "content": {"application/json": answered}}
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    titles: dict[int, list[str]] = {}
    for title, status in problems.known().values():
        titles.setdefault(status, []).append(title)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {
            "description": "; ".join(dict.fromkeys(titles[status])),
            "content": {problems.MEDIA_TYPE: schema},
        }
        for status in statuses
    }
    return {200: success, **refusals}


def _body_of(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": schema}}}
    return {"requestBody": {"required": True, "content": content}}


def router(settings: Settings, metrics: Metrics) -> APIRouter:
    """Return the routes of the API."""
    routes = APIRouter()

    @routes.post(
        "/v1/estimate",
        summary="Estimate one run",
        responses=documented(Result, 400, 404, 413, 415, 422, 500, 501),
        openapi_extra=_body_of(REQUEST_SCHEMA),
    )
    async def post_estimate(request: Request) -> Response:
        """Answer whether the run fits, with every row at the peak. The same body always gets the
        same bytes, so a repeated POST is safe and `ETag` is strong."""
        return await _document(
            request,
            settings,
            lambda body: to_json(answer(parse_request(body), metrics=metrics, door="api")),
        )

    @routes.post(
        "/v1/reconcile",
        summary="Explain a measurement or an out-of-memory message",
        responses=documented(Reconciliation, 400, 404, 413, 415, 422, 500, 501),
        openapi_extra=_body_of(MEASUREMENT_SCHEMA),
    )
    async def post_reconcile(request: Request) -> Response:
        """Answer which changes of the request would give the number that was measured, and which
        tensor would ask for the size that a message names."""
        return await _document(
            request,
            settings,
            lambda body: to_json(explain(parse_measurement(body), metrics=metrics, door="api")),
        )

    @routes.get(
        "/v1/models",
        summary="Search the models of the catalogue",
        responses=documented(ModelList, 422),
    )
    async def get_models(
        request: Request,
        q: Annotated[str, Query(max_length=200, description="words of the name")] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
    ) -> Response:
        """List models by name; all words of `q` must occur."""
        return _cacheable(request, model_list(q, limit))

    @routes.get("/v1/gpus", summary="List the GPUs of the catalogue", responses=documented(GpuList))
    async def get_gpus(request: Request) -> Response:
        """List every GPU with the memory that its driver offers."""
        return _cacheable(request, gpu_list())

    @routes.get("/v1/version", summary="Name the running version", responses=documented(Version))
    async def get_version(request: Request) -> Response:
        """Name the version that answers."""
        version = Version(name="vramplan", version=__version__, result_schema="estimate/v1")
        return _cacheable(request, version)

    @routes.get("/healthz", summary="Is the process alive", responses=documented(Health))
    async def get_health() -> Response:
        """Answer as long as the process does."""
        return _json(Health(status="ok"))

    @routes.get(
        "/readyz",
        summary="Can the process answer estimates",
        responses=documented(Health, 503),
    )
    async def get_readiness() -> Response:
        """Answer once the catalogue is loaded."""
        _load_catalogue()
        return _json(Health(status="ready"))

    @routes.get("/metrics", summary="Counters for Prometheus", include_in_schema=False)
    async def get_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


def _load_catalogue() -> None:
    try:
        models()
        find_gpu(gpus()[0].key)
    except (EstimatorError, OSError, ValueError, LookupError):
        raise HTTPException(503, "the catalogue cannot be read; install vramplan again") from None


def _require_json(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind, _, parameters = given.partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise HTTPException(
            415, f"the body is {given[:100] or 'of no type'!r}; send application/json in UTF-8"
        )


async def _body(request: Request, limit: int) -> bytes:
    """Return the body, never holding more of it than is allowed."""
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= limit:
            body += chunk
        elif received > _MAX_DISCARDED_BYTES:
            break
    if received > limit:
        raise HTTPException(413, f"the body is larger than {limit} bytes; send one run at a time")
    return bytes(body)


async def _document(
    request: Request, settings: Settings, content_for: Callable[[bytes], bytes]
) -> Response:
    """Return what a function makes of the body, with a strong `ETag`."""
    _require_json(request)
    body = await _body(request, settings.max_body_bytes)
    # A recipe seen for the first time takes a fraction of a second: others must not wait.
    content = await run_in_threadpool(content_for, body)
    return Response(content, media_type="application/json", headers={"ETag": _etag(content)})


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'


def _json(document: Struct) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


def _cacheable(request: Request, document: Struct) -> Response:
    """Return a document of the catalogue, or 304 when the client has these very bytes."""
    content = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    tag = _etag(content)
    headers = {"ETag": tag, "Cache-Control": "public, max-age=300"}
    known = request.headers.get("if-none-match", "")
    if tag in {item.strip().removeprefix("W/") for item in known.split(",")}:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/json", headers=headers)
