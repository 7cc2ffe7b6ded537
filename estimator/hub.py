"""The Hugging Face Hub: its cache on this disk, and the one door to the network (extra `[hub]`).

Only `config.json` is ever asked for, and never any code. The token comes from the environment
and is handled by huggingface_hub alone.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from estimator.config_file import MAX_CONFIG_BYTES, read_config
from estimator.errors import (
    InvalidRequestError,
    MalformedDocumentError,
    MissingDependencyError,
    ModelUnreachableError,
    UnknownModelError,
)

DEADLINE_SECONDS: Final = 20.0

_MODEL_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][\w./-]{0,63}", re.ASCII)
_ADVICE: Final = "pass --model path/to/config.json"


def is_model_id(name: str) -> bool:
    """Return whether a name has the form of a model id, which nothing but one is looked up by.

    Example:
        >>> is_model_id("meta-llama/Llama-3.1-8B"), is_model_id("../../etc/passwd")
        (True, False)
    """
    return _MODEL_ID.fullmatch(name) is not None and ".." not in name


def cached_config(model_id: str) -> dict[str, Any] | None:
    """Return the `config.json` of a model's main revision from the Hub cache on this disk.

    Layout: `models--ORG--NAME/refs/main` names the folder below `snapshots/`.
    None when this model's config was never downloaded here.

    Source: hf-hub, layout of the cache.
    """
    if not is_model_id(model_id):
        return None
    folder = _cache_folder() / f"models--{model_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    if not _is_revision(revision):
        return None
    path = folder / "snapshots" / revision / "config.json"
    return read_config(path) if path.is_file() else None


def fetch_config(model_id: str, revision: str | None = None) -> dict[str, Any]:
    """Download the `config.json` of a model from the Hub.

    Raises:
        InvalidRequestError: the id or the revision is not one.
        MissingDependencyError: huggingface_hub is not installed.
        UnknownModelError: the Hub has no such model, revision or file.
        ModelUnreachableError: the model is gated or private, or the Hub does not answer.
        MalformedDocumentError, InvalidConfigError: the file is not a configuration.
    """
    if not is_model_id(model_id) or not _is_revision(revision or "main"):
        raise InvalidRequestError(f"{model_id!r} at revision {revision!r} is not a model id")
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise MissingDependencyError("pip install 'vramplan[hub]'") from None

    def download() -> Path:
        # One small file: the library's progress bar would only stand in our output.
        disable_progress_bars()
        url = huggingface_hub.hf_hub_url(model_id, "config.json", revision=revision)
        size = huggingface_hub.get_hf_file_metadata(url).size
        # Looked at before the download, so that a huge file is never written to the disk.
        if size is not None and size > MAX_CONFIG_BYTES:
            raise MalformedDocumentError(
                f"config.json of {model_id} is {size} bytes, more than the {MAX_CONFIG_BYTES} "
                "that a configuration may have"
            )
        return Path(huggingface_hub.hf_hub_download(model_id, "config.json", revision=revision))

    return read_config(_mapped(model_id, lambda: _within_deadline(download)))


def _is_revision(revision: str) -> bool:
    return _REVISION.fullmatch(revision) is not None and ".." not in revision


def _cache_folder() -> Path:
    """Return the folder of the Hub cache, found as huggingface_hub finds it."""
    environment = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(variable):
            return _expanded(environment[variable])
    if environment.get("HF_HOME"):
        return _expanded(environment["HF_HOME"]) / "hub"
    return _expanded(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _within_deadline(work: Callable[[], Path]) -> Path:
    """Run `work` for at most the deadline: the library bounds each request, not their sum."""
    outcome: list[Path | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # handed to the caller's thread, which raises it
            outcome.append(error)

    thread = threading.Thread(target=run, name="hub-config", daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _mapped(model_id: str, work: Callable[[], Path]) -> Path:
    """Run `work` and turn each failure of the library into one of ours."""
    from huggingface_hub import errors

    try:
        return work()
    except MalformedDocumentError:
        raise
    except errors.GatedRepoError:
        raise ModelUnreachableError(
            f"{model_id} is gated: accept its licence on its Hub page and set HF_TOKEN, "
            f"or {_ADVICE}"
        ) from None
    except errors.RepositoryNotFoundError:
        # The Hub gives the same answer for a private model and for none.
        raise UnknownModelError(
            f"the Hub has no model {model_id!r}, or it is private: check the name, set HF_TOKEN if "
            f"it is private, or {_ADVICE}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownModelError(f"{model_id} has no such revision on the Hub") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise ModelUnreachableError(
            f"the Hub cannot be reached for {model_id} (no connection, or HF_HUB_OFFLINE is set); "
            f"{_ADVICE}"
        ) from None
    except errors.EntryNotFoundError:
        raise UnknownModelError(f"{model_id} has no config.json on the Hub; {_ADVICE}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelUnreachableError(
            f"the Hub answered {status} for {model_id}; set HF_TOKEN if the model needs one, "
            f"or {_ADVICE}"
        ) from None
    except TimeoutError:
        raise ModelUnreachableError(
            f"the Hub did not answer for {model_id} within {DEADLINE_SECONDS:.0f} s; try again, "
            f"or {_ADVICE}"
        ) from None
    except Exception as error:  # the HTTP client's own classes differ between versions
        raise ModelUnreachableError(
            f"the Hub cannot be reached for {model_id} ({type(error).__name__}); {_ADVICE}"
        ) from None
