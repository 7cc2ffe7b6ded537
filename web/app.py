"""The application: routes, headers, problems and the description of all of them."""

from __future__ import annotations

from fastapi import FastAPI

from estimator import __version__
from web import api, docs, page, problems
from web.settings import Settings
from web.shield import Metrics, Shield, security_headers


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the server; uvicorn calls this as its factory."""
    metrics = Metrics()
    headers = security_headers()
    # FastAPI's own documentation pages load their scripts from a CDN; `docs` has one of ours.
    app = FastAPI(
        title="vramplan",
        summary="Does this fine-tuning run fit in GPU memory, and why",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.include_router(api.router(settings or Settings(), metrics))
    app.include_router(page.router(metrics))
    app.include_router(docs.router(app))
    problems.install(app, headers)
    app.add_middleware(Shield, headers=headers, metrics=metrics)
    return app
