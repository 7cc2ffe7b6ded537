"""A stand-in for the Hub on this machine: the configurations of the cases, and nothing else.

Peers that take a model only by its Hub name ask it instead of the network. It answers what they
read: `config.json`, the architecture and the parameter count. Nothing else is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Final
from unittest import mock
from urllib.parse import urlsplit

from benchmarks.peers.case import Case

COMMIT: Final = "0" * 40
NOT_FOUND: Final = 404


@contextmanager
def stand_in_hub(cases: Iterable[Case]) -> Iterator[str]:
    """Serve the models of some cases, and point the Hub's own client at them.

    To be entered before `huggingface_hub` is imported, which reads its address once.
    """
    models = {case.model: case for case in cases}
    handler = type("Handler", (_Handler,), {"models": models})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with TemporaryDirectory() as cache:
        settings = {
            "HF_ENDPOINT": address,
            "HF_HOME": cache,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        try:
            with mock.patch.dict(os.environ, settings):
                yield address
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    models: Mapping[str, Case]

    def do_GET(self) -> None:
        """Answer with headers and body."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        case = next((case for name, case in self.models.items() if f"/{name}" in path), None)
        if case is None:
            return self._refuse("RepoNotFound")
        if path.startswith("/api/models/"):
            return self._send(information(case), body=body)
        if path.endswith("/config.json"):
            return self._send(case.config, body=body)
        return self._refuse("EntryNotFound")

    def _send(self, document: Mapping[str, Any], *, body: bool) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"config"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, code: str) -> None:
        self.send_response(NOT_FOUND)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing: the worker's output is its answers."""


def information(case: Case) -> dict[str, Any]:
    """Return what the Hub tells about a model."""
    return {
        "id": case.model,
        "modelId": case.model,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "library_name": "transformers",
        "siblings": [{"rfilename": "config.json"}],
        "config": {
            "architectures": case.config.get("architectures", []),
            "model_type": case.config.get("model_type"),
        },
        "safetensors": {
            "parameters": {"BF16": case.parameters},
            "total": case.parameters,
        },
    }
