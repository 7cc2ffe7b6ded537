"""`estimate serve`: it starts the server, or says in one line what is missing."""

import importlib.util

import pytest
import uvicorn
from click.testing import CliRunner

from estimator.errors import MissingDependencyError
from web.app import create_app
from web.cli import serve


@pytest.fixture
def started(monkeypatch):
    """What uvicorn was asked to run, instead of a server."""
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda *args, **named: calls.append((args, named)))
    return calls


def test_it_listens_on_the_loopback_address_unless_told_otherwise(started):
    assert CliRunner().invoke(serve, []).exit_code == 0
    ((application,), named) = started[0]
    assert application == "web.app:create_app"
    assert (named["host"], named["port"], named["workers"]) == ("127.0.0.1", 8000, 1)


def test_address_port_and_workers_are_the_operators_to_set(started):
    CliRunner().invoke(serve, ["--host", "0.0.0.0", "--port", "9000", "--workers", "2"])
    named = started[0][1]
    assert (named["host"], named["port"], named["workers"]) == ("0.0.0.0", 9000, 2)


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--workers", "0"], ["--port", "x"]])
def test_a_bad_flag_is_a_usage_error(started, arguments):
    assert CliRunner().invoke(serve, arguments).exit_code == 2
    assert not started


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name)
    )
    outcome = CliRunner().invoke(serve, [])
    assert isinstance(outcome.exception, MissingDependencyError)
    assert outcome.exception.exit_code == 3
    assert "pip install 'vramplan[web]'" in str(outcome.exception)
    assert "\n" not in str(outcome.exception)


def test_the_factory_needs_no_arguments():
    assert create_app().title == "vramplan"
