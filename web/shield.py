"""What every response carries, and what is counted about it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from estimator import __version__
from web.plotly_bundle import style_hashes

# plotly.js creates an empty style element and fills it through the CSSOM: the hash of no text.
_EMPTY_STYLE: Final = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"


def security_headers() -> dict[str, str]:
    """Return the headers of every response: nothing but our own files may load or run."""
    styles = " ".join(("'self'", _EMPTY_STYLE, *style_hashes()))
    policy = (
        "default-src 'none'",
        "script-src 'self'",
        f"style-src {styles}",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    }


class Metrics:
    """Counters of one process. A model's name is user text, so it is never a label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "vramplan_http_request_seconds",
            "Time to answer a request",
            ("route", "method", "status"),
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "vramplan_http_in_flight", "Requests being answered", registry=self.registry
        )
        self.verdicts = Counter(
            "vramplan_verdicts", "Answers by verdict", ("door", "verdict"), registry=self.registry
        )
        self.refusals = Counter(
            "vramplan_refusals", "Refused requests by reason", ("door", "reason"),
            registry=self.registry,
        )  # fmt: skip
        Info("vramplan_build", "The running version", registry=self.registry).info(
            {"version": __version__}
        )


class Shield:
    """Adds the security headers to each response, measures it, and answers HEAD.

    Plain ASGI: the framework's own middleware base class costs a task for every request.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], metrics: Metrics) -> None:
        self.app = app
        self.headers = headers
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500
        method = scope["method"]
        # FastAPI's routes do not answer HEAD, which every address that answers GET has to.
        if method == "HEAD":
            scope["method"] = "GET"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(self.headers)
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, send_with_headers)
            finally:
                self.metrics.seconds.labels(_route(scope), _method(method), str(status)).observe(
                    time.perf_counter() - start
                )


def _route(scope: Scope) -> str:
    """Return the route's template, so that paths made up by a client add no time series."""
    return getattr(scope.get("route"), "path", "unmatched")


def _method(method: str) -> str:
    """Return the method, or one word for all the methods that no route has."""
    return method if method in ("GET", "POST", "HEAD") else "other"
