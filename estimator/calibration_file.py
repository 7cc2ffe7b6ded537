"""The calibration files: how far measurements lay from predictions, and what a device takes.

`estimate calibrate` computes them from measurement records; here they are only read. A file holds
quantiles, not a model: at run time a range is a lookup and a multiplication.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from estimator.catalog.folder import data_folder
from estimator.errors import InvalidCalibrationError
from estimator.record import Meter, Origin
from estimator.result import Range

SCHEMA: Final = "calibration/v1"
FOLDER: Final = "calibration"

Quantity = Literal[Meter, "needed"]
Kind = Literal["full", "adapters", "quantized"]


class Traits(Struct, frozen=True, cache_hash=True):
    """What decides whether a request is like the runs that were measured.

    Args:
        kind: of the method: trains the base weights, adapters on them, or on packed ones.
        parameters: of the whole model.
        choices: the field of the request and its value, in words.
    """

    kind: Kind
    parameters: int
    choices: tuple[tuple[str, str], ...]


class Outside(Struct, frozen=True):
    """How far a request lies from what was measured.

    Args:
        reasons: each choice that no run had, and each size beyond the largest, in words.
        steps: how many: one for each choice, one for each doubling of the model's parameters.
    """

    reasons: tuple[str, ...]
    steps: float


class Stratum(Struct, frozen=True):
    """The residuals of one quantity, of all methods or of one kind.

    Args:
        kind: None for all methods.
        rows: how many measurements.
        groups: how many of them each group has: a source, or a model family.
        supported: the highest confidence that so many rows can give by themselves.
        levels: pairs of a confidence and the spread that holds with it, both rising. A spread of
            0.05 says that measured over expected lies between 1 / 1.05 and 1.05.
        parameters: the smallest and the largest model.
        tokens, seq_len: the largest micro-batch [tokens] and length.
        choices: every value of each field that a run had.

    Source: mapie, section 8, for the quantiles of exchangeable residuals.
    """

    quantity: Quantity
    kind: Kind | None
    rows: int
    groups: dict[str, int]
    supported: float
    levels: tuple[tuple[float, float], ...]
    parameters: tuple[int, int]
    tokens: int
    seq_len: int
    choices: dict[str, tuple[str, ...]]

    def level(self, confidence: float) -> tuple[float, float]:
        """Return the lowest level that is at least as confident, and its spread."""
        return next((each for each in self.levels if each[0] >= confidence), self.levels[-1])

    def spread(self, confidence: float) -> float:
        """Return the spread of the lowest level that is at least as confident."""
        return self.level(confidence)[1]

    def outside(self, traits: Traits) -> Outside:
        """Return how far a request lies from these runs, whatever its batch."""
        reasons = [
            f"{field} {value}"
            for field, value in traits.choices
            if value not in self.choices.get(field, ())
        ]
        smallest, largest = self.parameters
        doublings = max(
            _doublings(traits.parameters, largest), _doublings(smallest, traits.parameters)
        )
        steps = len(reasons) + doublings
        if doublings:
            reasons.append(f"a model {2**doublings:.1f} times beyond")
        return Outside(tuple(reasons), steps)

    def beyond(self, tokens: int, seq_len: int) -> float:
        """Return by how many doublings a micro-batch or a length exceeds the largest measured."""
        return max(_doublings(tokens, self.tokens), _doublings(seq_len, self.seq_len))


def _doublings(value: int, known: int) -> float:
    return log2(value / known) if value > known else 0.0


class Constants(Struct, frozen=True):
    """What a process takes on a device beside its tensors; None where it was not measured [bytes].

    Args:
        context: CUDA context and loaded kernels after a training step.
        idle_context: the same before the first tensor; the difference is the growth of modules.
        cublas_workspace: one workspace of cuBLAS.
    """

    context: Range | None = None
    idle_context: Range | None = None
    cublas_workspace: int | None = None


class Input(Struct, frozen=True):
    """A file of records that a calibration was computed from."""

    file: str
    sha256: str
    records: int


class HeldOut(Struct, frozen=True):
    """How the ranges hold on groups that they were not computed from, one group at a time."""

    quantity: Quantity
    confidence: float
    rows: int
    inside: int


class Calibration(Struct, frozen=True):
    """One calibration file.

    Args:
        gpu: the catalogue's id of the card; None where records of any card were used.
        stack: the versions of the libraries that decide; empty for published runs.
    """

    schema: Literal["calibration/v1"]
    name: str
    origin: Origin
    gpu: str | None
    compute_capability: str | None
    stack: dict[str, str]
    made_from: tuple[Input, ...]
    constants: Constants
    strata: tuple[Stratum, ...]
    held_out: tuple[HeldOut, ...]

    def stratum(self, quantity: Quantity, kind: Kind) -> Stratum | None:
        """Return the residuals of a kind of method, else those of all methods."""
        found = [each for each in self.strata if each.quantity == quantity]
        own = (each for each in found if each.kind == kind)
        return next(own, next((each for each in found if each.kind is None), None))


def read(path: Path) -> Calibration:
    """Return one calibration file.

    Raises:
        InvalidCalibrationError: the file cannot be read, or is no calibration.
    """
    try:
        content = path.read_bytes()
        if _OLD_SPELLING in content:
            return msgspec.convert(_respelled(msgspec.json.decode(content)), Calibration)
        return msgspec.json.decode(content, type=Calibration)
    except OSError as error:
        raise InvalidCalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidCalibrationError(f"{path}: not a calibration: {error}") from error


_OLD_SPELLING: Final = b'"device used"'
"""How older files spell a quantity that is `device-used` on every door."""


def _respelled(document: Any) -> Any:
    """Return the content of an older file with today's names of quantities."""
    if not isinstance(document, dict):
        return document
    renamed = dict(document)
    for field in ("strata", "held_out"):
        rows = document.get(field)
        if isinstance(rows, list):
            renamed[field] = [_renamed(each) for each in rows]
    return renamed


def _renamed(row: Any) -> Any:
    if isinstance(row, dict) and row.get("quantity") == "device used":
        return {**row, "quantity": "device-used"}
    return row


def encode(calibration: Calibration) -> bytes:
    """Return a calibration as the file holds it."""
    return msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n"


@lru_cache(maxsize=1)
def installed() -> tuple[Calibration, ...]:
    """Return the calibrations that came with this installation; simulated ones are never used."""
    folder = data_folder() / FOLDER
    found = (read(path) for path in sorted(folder.glob("*.json")))
    return tuple(each for each in found if each.origin != "simulated")


class Chosen(Struct, frozen=True):
    """The calibrations for a card, the nearest first.

    Args:
        own: of this very card.
        kin: of another card of its architecture.
        published: of what others measured, on any card.
    """

    own: Calibration | None = None
    kin: Calibration | None = None
    published: Calibration | None = None


def chosen(
    calibrations: Iterable[Calibration],
    gpu: str | None,
    compute_capability: str,
    software: str = "",
) -> Chosen:
    """Return those of some calibrations that speak about a card.

    Of several for one card that with the nearest software is taken, and of equals the newest.

    Args:
        software: framework and version, as the choices of a stratum name them.
    """
    own, kin, published = [], [], []
    for each in calibrations:
        if each.gpu is None:
            published.append(each)
        elif each.gpu == gpu:
            own.append(each)
        elif each.compute_capability == compute_capability:
            kin.append(each)
    return Chosen(*(_nearest(each, software) for each in (own, kin, published)))


def _nearest(found: Sequence[Calibration], software: str) -> Calibration | None:
    return max(found, key=lambda each: _nearness(each, software), default=None)


def _nearness(each: Calibration, software: str) -> tuple[object, ...]:
    """Return what is greater for the nearer of two calibrations.

    First comes one that has runs of the software itself, then the one whose version of the
    framework differs least, then the one with the higher versions.
    """
    framework, _, version = software.partition(" ")
    ran = any(software in stratum.choices.get("software", ()) for stratum in each.strata)
    apart = tuple(
        -abs(asked - here)
        for asked, here in zip(
            version_numbers(version), version_numbers(each.stack.get(framework, "")), strict=False
        )
    )
    newer = tuple(version_numbers(each.stack.get(name, "")) for name in ("torch", "transformers"))
    return (ran, bool(apart), apart, newer, each.name)


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, which compare as versions do; none of a word.

    Example:
        >>> version_numbers("2.13") > version_numbers("2.9") > version_numbers("unknown")
        True
    """
    return tuple(int(part) for part in version.split(".") if part.isdigit())
