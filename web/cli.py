"""`estimate serve`: the page and the JSON API on this machine."""

from __future__ import annotations

import importlib.util
from typing import Final

import click

from estimator.errors import MissingDependencyError

_NEEDED: Final = ("fastapi", "uvicorn", "jinja2", "plotly", "prometheus_client")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65_535), help="Port."
)
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes."
)
def serve(host: str, port: int, workers: int) -> None:
    """Serve the page and the JSON API."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"serve needs {', '.join(missing)}, not installed: pip install 'vramplan[web]'"
        )
    import uvicorn

    uvicorn.run(
        "web.app:create_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        server_header=False,
        # A client that does not send its request must not hold a connection for long.
        timeout_keep_alive=10,
    )
