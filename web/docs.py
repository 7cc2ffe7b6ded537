"""The OpenAPI document, a page that shows it, and the page behind each problem's `type`."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from estimator.measurement import MAX_MEASURED, MAX_SIZE_CHARACTERS, METERS
from estimator.oom_message import MAX_MESSAGE_CHARACTERS
from estimator.request import (
    CHECKPOINTING_ALIASES,
    METHOD_ALIASES,
    SHORT_FORMS,
    EstimateRequest,
)
from estimator.units import MiB
from web import problems
from web.api import ANSWERS
from web.templates import render

_REF: Final = "#/components/schemas/{name}"
_PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "description": "RFC 9457 problem details.",
    "required": ["type", "title", "status", "detail", "instance", "errors"],
    "properties": {
        "type": {"type": "string", "description": "names the kind; stable"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "one line: what is wrong and what to do"},
        "instance": {"type": "string", "description": "the path that was asked"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["detail"],
                "properties": {
                    "pointer": {"type": "string", "description": "JSON pointer into the body"},
                    "parameter": {"type": "string", "description": "name of a query parameter"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}


def router(app: FastAPI) -> APIRouter:
    """Return the routes that describe `app`."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/openapi.json")
    async def get_openapi_document() -> Response:
        content = json.dumps(openapi(app), indent=2).encode() + b"\n"
        return Response(content, media_type="application/json")

    @routes.get("/docs")
    async def get_docs() -> HTMLResponse:
        return HTMLResponse(render("docs.html", document=openapi(app), problems=problems.known()))

    @routes.get(problems.TYPE_PREFIX + "{slug}")
    async def get_problem(slug: str) -> HTMLResponse:
        known = problems.known()
        if slug not in known:
            raise HTTPException(404, f"no problem is called {slug[:100]!r}; see /docs")
        title, status = known[slug]
        return HTMLResponse(render("problem.html", slug=slug, title=title, status=status))

    return routes


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; built once, then kept on the application."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            summary=app.summary,
            version=app.version,
            openapi_version="3.1.0",
            routes=app.routes,
        )
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(msgspec.json.schema_components(ANSWERS, ref_template=_REF)[1])
        request = request_schema()
        components.update(request.pop("$defs"))
        components["EstimateRequest"] = request
        components["Measurement"] = _measurement_schema()
        components["Problem"] = _PROBLEM
        app.openapi_schema = document
    return app.openapi_schema


def _measurement_schema() -> dict[str, Any]:
    """Return the schema of the document that asks about a measurement."""
    nothing = {"type": "null"}
    size = {"type": "integer", "minimum": MiB, "maximum": MAX_MEASURED}
    written = {"type": "string", "minLength": 1, "maxLength": MAX_SIZE_CHARACTERS}
    message = {"type": "string", "maxLength": MAX_MESSAGE_CHARACTERS}
    return {
        "type": "object",
        "description": "What was measured: a number with a request, or a message.",
        "additionalProperties": False,
        "properties": {
            "request": {"anyOf": [{"$ref": _REF.format(name="EstimateRequest")}, nothing]},
            "measured": {"anyOf": [written, size, nothing]},
            "meter": {"enum": [*METERS, None]},
            "message": {"anyOf": [message, nothing]},
        },
    }


def request_schema() -> dict[str, Any]:
    """Return the request's JSON schema, with the one-word spellings that the parser accepts."""
    (_, definitions) = msgspec.json.schema_components([EstimateRequest], ref_template=_REF)
    schema: dict[str, Any] = definitions.pop("EstimateRequest")
    schema["$defs"] = definitions
    properties = schema["properties"]
    for field in SHORT_FORMS:
        section = properties[field]
        kept = {key: section.pop(key) for key in ("title", "default") if key in section}
        properties[field] = {**kept, "anyOf": [section, _word(section, field, schema)]}
        for name in section.get("discriminator", {}).get("mapping", {}).values():
            # Which kind a section is follows from this field, so here its default does not help.
            schema["$defs"][name.rpartition("/")[2]]["required"] = [SHORT_FORMS[field]]
    for alias in CHECKPOINTING_ALIASES:
        properties[alias] = {
            "description": "another spelling of activation_checkpointing",
            "anyOf": [{"type": "boolean"}, {"type": "string", "minLength": 1, "maxLength": 40}],
        }
    return schema


def _word(section: dict[str, Any], field: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the one word that may stand for a whole section."""
    members = [
        definition["properties"][SHORT_FORMS[field]]
        for name, definition in schema["$defs"].items()
        if name in _sections(section)
    ]
    words = [word for member in members for word in member.get("enum", [member.get("const")])]
    if None in words:
        return {"type": "string", "minLength": 1}
    return {"enum": words + (list(METHOD_ALIASES) if field == "method" else [])}


def _sections(node: dict[str, Any]) -> set[str]:
    """Return the names of the definitions that a field's schema refers to."""
    inner = [node, *node.get("anyOf", []), *node.get("oneOf", [])]
    return {part["$ref"].rpartition("/")[2] for part in inner if "$ref" in part}
