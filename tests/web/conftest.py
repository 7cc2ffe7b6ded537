"""The application under test: in process, and behind a socket on the loopback address."""

import threading
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.testclient import TestClient

from web.app import create_app


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A client of a fresh application; a failure inside it is an answer, not an exception."""
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """The address of a server of this test run, on a free port of the loopback address."""
    server = uvicorn.Server(uvicorn.Config(create_app(), port=0, log_level="error", ws="none"))
    started = threading.Event()
    thread = threading.Thread(target=_serve, args=(server, started), daemon=True)
    thread.start()
    assert started.wait(30), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def _serve(server: uvicorn.Server, started: threading.Event) -> None:
    startup = server.startup

    async def announce(*args: object, **named: object) -> None:
        await startup(*args, **named)
        started.set()

    server.startup = announce
    server.run()
