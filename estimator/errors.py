"""Every way in which a request can be refused, with the exit code and HTTP status it maps to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known word that is nearest, as the end of a refusal; nothing where none is near.

    Example:
        >>> did_you_mean("lorra", ["full", "lora", "loha"])
        "; did you mean 'lora'?"
    """
    # difflib is slow to import and needed only on this path.
    import difflib

    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class EstimatorError(Exception):
    """One clear line for the user: what was asked, what is allowed, what to do next."""

    exit_code: ClassVar[int] = 2
    status: ClassVar[int] = 422
    slug: ClassVar[str] = "invalid-request"
    title: ClassVar[str] = "The request is not valid"


class InvalidRequestError(EstimatorError):
    """A field is unknown, missing, of the wrong type or out of range.

    Args:
        message: the line for a person.
        errors: one `(JSON pointer, detail)` for each field that is wrong.
    """

    def __init__(self, message: str, errors: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.errors = errors


class MalformedDocumentError(EstimatorError):
    """The text is not JSON or YAML, is too large, too deep, or not text at all."""

    status = 400
    slug = "malformed-document"
    title = "The document cannot be read"


class InvalidConfigError(EstimatorError):
    """A model's config.json lacks a field, or holds a value that no model can have."""

    slug = "invalid-config"
    title = "The model configuration is not valid"


class UnknownGpuError(EstimatorError):
    """The GPU is not in the catalogue and no memory size was given."""

    slug = "unknown-gpu"
    title = "The GPU is not known"


class NoDriverError(EstimatorError):
    """`--gpu auto` found no NVIDIA driver or no GPU."""

    slug = "no-gpu-driver"
    title = "No GPU was found on this machine"


class CannotEstimateError(EstimatorError):
    """The request is well formed, but there is no sourced answer to it."""

    exit_code = 3
    slug = "cannot-estimate"
    title = "There is no sourced answer to this request"


class UnknownModelError(CannotEstimateError):
    """The model is in no place where we may look."""

    status = 404
    slug = "unknown-model"
    title = "The model is not known"


class ModelUnreachableError(CannotEstimateError):
    """The Hub refused or did not answer."""

    status = 503
    slug = "model-unreachable"
    title = "The model's configuration could not be fetched"


class UnsupportedModelError(CannotEstimateError):
    """The model's architecture has no specification here yet."""

    slug = "unsupported-model"
    title = "The model family is not supported yet"


class UnsupportedCombinationError(CannotEstimateError):
    """A technique, or a combination of techniques, that has no source here yet."""

    slug = "unsupported-combination"
    title = "The combination is not supported yet"


class MissingDependencyError(CannotEstimateError):
    """An optional extra that the request needs is not installed."""

    status = 501
    slug = "missing-dependency"
    title = "An optional dependency is not installed"


class InvalidRecordError(EstimatorError):
    """A measurement record that cannot be read."""

    status = 422
    slug = "invalid-record"
    title = "The measurement record cannot be read"


class InvalidCalibrationError(EstimatorError):
    """A calibration file that cannot be read, or records that none can be computed from."""

    slug = "invalid-calibration"
    title = "The calibration cannot be used"
