"""The page "Will this fit on my GPU?": its whole state is in the address, script or no script."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from msgspec.structs import replace
from starlette.exceptions import HTTPException

from estimator.catalog import find_gpu
from estimator.errors import EstimatorError, InvalidRequestError, UnknownGpuError
from estimator.measurement import METERS, parse_measurement
from estimator.request import EstimateRequest, parse_request
from estimator.result import Result, Suggestion
from web import form, plotly_bundle, problems
from web.chart import peak_chart, timeline_chart, waterfall_bars
from web.door import answer, explain
from web.listing import gpu_list, model_list
from web.shield import Metrics
from web.templates import render

_KINDS: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_EVERY_MODEL: Final = 10_000

# Runs that a visitor may start from; each is an address of this page.
EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "Llama 3.1 8B, QLoRA, RTX 4090": {
        "model": "meta-llama/Llama-3.1-8B",
        "method": "qlora",
        "hardware": {"gpu": "rtx-4090"},
    },
    "Mistral 7B, full, A100 80 GB": {
        "model": "mistralai/Mistral-7B-v0.1",
        "micro_batch_size": 4,
        "seq_len": 4096,
        "activation_checkpointing": "full",
        "attention": "flash_attention_2",
        "hardware": {"gpu": "a100-80gb"},
    },
}

Pairs = list[tuple[str, str]]


def router(metrics: Metrics) -> APIRouter:
    """Return the routes of the page and of the files that it loads."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def get_page(request: Request) -> HTMLResponse:
        pairs = _pairs(request)
        view, status = _view(pairs, metrics)
        html = render("page.html", **view, **_form_view(pairs))
        return HTMLResponse(html, status_code=status)

    # The status is 200 even for a refusal: this part of the page says what is wrong with the form,
    # and a browser logs every other status as an error while somebody is still typing.
    @routes.get("/answer")
    def get_answer(request: Request) -> HTMLResponse:
        view, _ = _view(_pairs(request), metrics)
        return HTMLResponse(render("answer.html", **view))

    @routes.get("/static/{name}")
    async def get_static(name: str) -> Response:
        if name not in _static():
            raise HTTPException(404)
        content, kind = _static()[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    @routes.get(plotly_bundle.path())
    async def get_plotly(request: Request) -> Response:
        headers = {
            "Cache-Control": "public, max-age=31536000, immutable",
            "Vary": "Accept-Encoding",
        }
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(
                plotly_bundle.compressed_script(), media_type="text/javascript", headers=headers
            )
        return Response(plotly_bundle.script(), media_type="text/javascript", headers=headers)

    return routes


def _pairs(request: Request) -> Pairs:
    return list(request.query_params.multi_items())


@cache
def _static() -> dict[str, tuple[bytes, str]]:
    """Return the page's own files by name: no path is ever built from a URL."""
    folder = files("web") / "static"
    return {
        item.name: (item.read_bytes(), _KINDS[item.name[item.name.rindex(".") :]])
        for item in folder.iterdir()
        if item.is_file()
    }


def _view(pairs: Pairs, metrics: Metrics) -> tuple[dict[str, Any], int]:
    """Return what the answer's template shows, and the status of the whole page."""
    view: dict[str, Any] = {
        "result": None,
        "problem": None,
        "peak": None,
        "timeline": None,
        "waterfall": (),
        "suggestions": (),
        "command": None,
        "request_json": None,
        "examples": {label: form.write(document) for label, document in EXAMPLES.items()},
    }
    everything = pairs
    pairs = [(name, value) for name, value in pairs if name not in MEASURED]
    if not any(name in ("model", form.CONFIG) and value.strip() for name, value in pairs):
        return {**view, **_measured(everything, None, metrics)}, 200
    try:
        document = form.read(pairs)
        request = parse_request(document)
        result = answer(request, metrics=metrics, door="page")
    except EstimatorError as error:
        problem = problems.of_estimator(error)
        return {**view, **_measured([], None, metrics), "problem": problem}, problem.status
    shown = {
        "result": result,
        "peak": peak_chart(result),
        "timeline": timeline_chart(result),
        "waterfall": waterfall_bars(result),
        "suggestions": _suggestions(pairs, result),
        "command": form.command(pairs),
        "request_json": json.dumps(document, indent=2),
    }
    return {**view, **shown, **_measured(everything, request, metrics)}, 200


# What the box below the answer asks about; all other names of an address are the form's.
MEASURED: Final = ("measured", "meter", "oom")
# A message is part of an address too: the one sentence of torch has about 700 characters.
MAX_MESSAGE: Final = 4_000


def _measured(pairs: Pairs, request: EstimateRequest | None, metrics: Metrics) -> dict[str, Any]:
    """Return what the box below the answer shows: its own fields, and what they get."""
    given = {name: value.strip() for name, value in pairs if name in MEASURED and value.strip()}
    view: dict[str, Any] = {
        "box": given,
        "kept": [(name, value) for name, value in pairs if name not in MEASURED and value.strip()],
        "meters": METERS,
        "max_message": MAX_MESSAGE,
        "reconciled": None,
        "box_problem": None,
    }
    if not given.keys() & {"measured", "oom"}:
        return view
    try:
        if len(given.get("oom", "")) > MAX_MESSAGE:
            raise InvalidRequestError(
                f"message: longer than {MAX_MESSAGE} characters; paste the one sentence, or send "
                "all of it to POST /v1/reconcile"
            )
        document = {
            "measured": given.get("measured"),
            "meter": given.get("meter"),
            "message": given.get("oom"),
        }
        asked = replace(parse_measurement(document), request=request)
        return {**view, "reconciled": explain(asked, metrics=metrics, door="page")}
    except EstimatorError as error:
        return {**view, "box_problem": problems.of_estimator(error)}


def _suggestions(pairs: Pairs, result: Result) -> tuple[tuple[Suggestion, str], ...]:
    """Return each suggestion with the query that applies it."""
    return tuple((item, form.changed(pairs, item.change)) for item in result.suggestions)


def _form_view(pairs: Pairs) -> dict[str, Any]:
    given = {name: value for name, value in pairs if value.strip()}
    first = [form.controls()[pointer] for pointer in form.FIRST]
    gpu_name = form.controls()["/hardware/gpu"].name
    return {
        "given": {**given, gpu_name: _gpu_key(given.get(gpu_name, ""))},
        "first": first,
        "groups": form.groups(),
        "config_name": form.CONFIG,
        "config_limit": form.MAX_CONFIG_CHARACTERS,
        "models": _model_names(),
        "gpus": _gpus_by_segment(),
        "plotly_path": plotly_bundle.path(),
    }


def _gpu_key(name: str) -> str:
    """Return the menu's entry for any name of the card; an unknown name stays as it was typed."""
    try:
        return find_gpu(name).key if name else ""
    except UnknownGpuError:
        return name


@cache
def _model_names() -> tuple[str, ...]:
    return tuple(sorted(entry.id for entry in model_list("", _EVERY_MODEL).models))


@cache
def _gpus_by_segment() -> dict[str, list[Any]]:
    entries = sorted(gpu_list().gpus, key=lambda entry: entry.segment)
    return {
        segment: sorted(members, key=lambda entry: entry.name)
        for segment, members in groupby(entries, key=lambda entry: entry.segment)
    }
