"""Refusals as RFC 9457 problem documents: one shape for our own errors and the framework's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from estimator.errors import EstimatorError, InvalidRequestError

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "/problems/"

# What the framework refuses before our own code runs, and the refusals that only HTTP knows.
HTTP_PROBLEMS: Final[dict[int, tuple[str, str]]] = {
    400: ("malformed-document", "The document cannot be read"),
    404: ("not-found", "There is nothing at this address"),
    405: ("method-not-allowed", "The method is not allowed here"),
    413: ("body-too-large", "The body is too large"),
    415: ("unsupported-media-type", "The body is not JSON"),
    500: ("internal-error", "The server failed"),
    503: ("not-ready", "The server is not ready"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One refusal.

    Args:
        errors: one `{"pointer" | "parameter": …, "detail": …}` for each place that is wrong.
        headers: HTTP headers that go with the status, such as Allow.
    """

    slug: str
    title: str
    status: int
    detail: str
    errors: tuple[dict[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def document(self, instance: str) -> dict[str, Any]:
        """Return the members of the problem document; `instance` is the path that was asked."""
        return {
            "type": TYPE_PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": quote(instance),
            "errors": list(self.errors),
        }


def of_estimator(error: EstimatorError) -> Problem:
    """Return the problem that an error of the core is over HTTP."""
    places = error.errors if isinstance(error, InvalidRequestError) else ()
    return Problem(
        slug=error.slug,
        title=error.title,
        status=error.status,
        detail=str(error),
        errors=tuple({"pointer": pointer, "detail": detail} for pointer, detail in places),
    )


def of_http(error: HTTPException) -> Problem:
    """Return the problem that an HTTP refusal of the framework or of the API is."""
    phrase = HTTPStatus(error.status_code).phrase
    slug, title = HTTP_PROBLEMS.get(error.status_code, (phrase.lower().replace(" ", "-"), phrase))
    return Problem(
        slug=slug,
        title=title,
        status=error.status_code,
        detail=error.detail,
        headers=error.headers or {},
    )


def of_parameters(error: RequestValidationError) -> Problem:
    """Return the problem of query parameters that have the wrong type or range."""
    places = tuple(
        {"parameter": str(place["loc"][-1]), "detail": str(place["msg"])}
        for place in error.errors()
    )
    return Problem(
        slug=InvalidRequestError.slug,
        title=InvalidRequestError.title,
        status=InvalidRequestError.status,
        detail="; ".join(f"{place['parameter']}: {place['detail']}" for place in places),
        errors=places,
    )


INTERNAL: Final = Problem(
    slug=HTTP_PROBLEMS[500][0],
    title=HTTP_PROBLEMS[500][1],
    status=500,
    detail="the estimator failed on this request; nothing about it was kept except a log line",
)


def response(problem: Problem, request: Request) -> Response:
    """Return the problem as an HTTP response; lone surrogates are escaped, so it always encodes."""
    document = problem.document(request.url.path)
    return Response(
        content=json.dumps(document, indent=2).encode() + b"\n",
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=dict(problem.headers),
    )


def install(app: FastAPI, always: Mapping[str, str]) -> None:
    """Answer every error of the application with a problem document.

    Args:
        always: headers of every response. The framework answers 500 outside all middleware, so
            that one response has to be given them here.
    """

    async def on_estimator(request: Request, error: Exception) -> Response:
        assert isinstance(error, EstimatorError)
        return response(of_estimator(error), request)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = error.detail
        if error.status_code == 404 and detail == HTTPStatus(404).phrase:
            detail = f"nothing is served at {request.url.path!r}; see /docs"
        if error.status_code == 405 and detail == HTTPStatus(405).phrase:
            allowed = (error.headers or {}).get("Allow", "another method")
            detail = f"{request.method} is not allowed here; use {allowed}"
        return response(of_http(HTTPException(error.status_code, detail, error.headers)), request)

    async def on_parameters(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response(of_parameters(error), request)

    async def on_failure(request: Request, error: Exception) -> Response:
        answer = response(INTERNAL, request)
        answer.headers.update(always)
        return answer

    app.add_exception_handler(EstimatorError, on_estimator)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_parameters)
    app.add_exception_handler(Exception, on_failure)


def known() -> dict[str, tuple[str, int]]:
    """Return the title and status of every problem slug, for the page behind its `type`."""
    found = {slug: (title, status) for status, (slug, title) in HTTP_PROBLEMS.items()}
    for error in _subclasses(EstimatorError):
        found[error.slug] = (error.title, error.status)
    return dict(sorted(found.items()))


def _subclasses(error: type[EstimatorError]) -> Iterator[type[EstimatorError]]:
    yield error
    for child in error.__subclasses__():
        yield from _subclasses(child)
