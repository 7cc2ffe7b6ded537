"""The Hub: its cache on disk is read as upstream lays it out, and its refusals become ours."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest

from estimator import hub
from estimator.errors import (
    InvalidRequestError,
    MalformedDocumentError,
    MissingDependencyError,
    ModelUnreachableError,
    UnknownModelError,
)

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

MODEL = "some-org/Some-Model"
TINY = {"model_type": "llama", "hidden_size": 64}


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A Hub that serves one config; a test changes what it does."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    state = SimpleNamespace(path=path, size=path.stat().st_size, error=None, downloads=[])

    def metadata(url):
        assert url.endswith("/some-org/Some-Model/resolve/main/config.json")
        if state.error is not None:
            raise state.error
        return SimpleNamespace(size=state.size)

    def download(model_id, filename, revision):
        state.downloads.append((model_id, filename, revision))
        return str(state.path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state


def http_error(kind, status=401):
    """An error of the library, as it raises it for an answer of the Hub."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = kind.__new__(kind)
    Exception.__init__(error, "the library's own long text")
    error.response = response
    return error


def test_only_the_config_is_downloaded(fake_hub):
    assert hub.fetch_config(MODEL) == TINY
    assert fake_hub.downloads == [(MODEL, "config.json", None)]


@pytest.mark.parametrize(
    ("error", "ours", "says"),
    [
        (http_error(errors.GatedRepoError, 403), ModelUnreachableError, "HF_TOKEN"),
        (http_error(errors.RepositoryNotFoundError), UnknownModelError, "private"),
        (http_error(errors.RevisionNotFoundError, 404), UnknownModelError, "revision"),
        (errors.LocalEntryNotFoundError("offline"), ModelUnreachableError, "cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), ModelUnreachableError, "HF_HUB_OFFLINE"),
        (errors.EntryNotFoundError("no file"), UnknownModelError, "no config.json"),
        (http_error(errors.HfHubHTTPError, 503), ModelUnreachableError, "answered 503"),
        (ConnectionError("refused"), ModelUnreachableError, "ConnectionError"),
    ],
)
def test_each_refusal_of_the_hub_becomes_one_clear_line(fake_hub, error, ours, says):
    fake_hub.error = error
    with pytest.raises(ours, match=says) as refusal:
        hub.fetch_config(MODEL)
    assert "\n" not in str(refusal.value)
    assert MODEL in str(refusal.value)
    assert fake_hub.downloads == []


def test_a_gated_model_says_that_a_local_config_does_too(fake_hub):
    fake_hub.error = http_error(errors.GatedRepoError, 403)
    with pytest.raises(ModelUnreachableError, match=r"--model path/to/config\.json"):
        hub.fetch_config(MODEL)


def test_a_huge_config_is_refused_before_it_is_downloaded(fake_hub):
    fake_hub.size = 50 * 1024 * 1024
    with pytest.raises(MalformedDocumentError, match="52428800 bytes"):
        hub.fetch_config(MODEL)
    assert fake_hub.downloads == []


def test_a_page_instead_of_json_is_refused(fake_hub):
    fake_hub.path.write_text("<!doctype html>")
    with pytest.raises(MalformedDocumentError, match="not valid JSON"):
        hub.fetch_config(MODEL)


def test_a_hub_that_does_not_answer_is_not_waited_for(fake_hub, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(hub, "DEADLINE_SECONDS", 0.01)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: release.wait())
    try:
        with pytest.raises(ModelUnreachableError, match="did not answer"):
            hub.fetch_config(MODEL)
    finally:
        release.set()


def test_without_the_extra_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vramplan\[hub\]'"):
        hub.fetch_config(MODEL)


@pytest.mark.parametrize(
    ("model_id", "revision"),
    [("../x", None), ("https://example.org/a", None), (MODEL, "../../x"), (MODEL, "/etc")],
)
def test_what_is_not_an_id_or_a_revision_never_leaves_this_machine(fake_hub, model_id, revision):
    with pytest.raises(InvalidRequestError):
        hub.fetch_config(model_id, revision)
    assert fake_hub.downloads == []


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "{home}/a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{home}/b", "HF_HOME": "{home}/x"}, "b"),
        ({"HF_HOME": "{home}/c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "{home}/d"}, "d/huggingface/hub"),
        ({}, ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_keeps_it(tmp_path, monkeypatch, variables, folder):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    model = tmp_path / folder / "models--some-org--Some-Model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123\n")
    (model / "snapshots" / "abc123").mkdir(parents=True)
    (model / "snapshots" / "abc123" / "config.json").write_text(json.dumps(TINY))
    assert hub.cached_config(MODEL) == TINY


@pytest.mark.parametrize("revision", ["../../outside", "/outside", "", "a\nb", "missing", "é"])
def test_a_broken_reference_in_the_cache_is_a_miss(tmp_path, monkeypatch, revision):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--some-org--Some-Model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(revision, encoding="utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text(json.dumps(TINY))
    assert hub.cached_config(MODEL) is None


def test_a_model_that_was_never_downloaded_is_a_miss(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert hub.cached_config(MODEL) is None
    assert hub.cached_config("../etc") is None
