"""The file that a campaign adds its records to, and what a case is called in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from estimator.catalog import find_gpu
from estimator.errors import (
    EstimatorError,
    InvalidRequestError,
    MissingDependencyError,
    NoDriverError,
    UnknownGpuError,
)
from estimator.nvml import probe
from estimator.record import Environment, Origin, Probe, Record, Run, append, encode, read
from estimator.request import parse_request
from profiler.matrices import Case, canonical
from profiler.versions import file_stem

STACK: Final = ("torch", "transformers", "accelerate")
MEASUREMENTS: Final = Path(__file__).resolve().parents[1] / "data" / "measurements"

_DISTRIBUTIONS: Final = {
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
}
_ID_CHARACTERS: Final = 12


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the cases run: a device and its software.

    Args:
        device: `cuda` or `simulated`.
        gpu: the name that the driver gives; that of the catalogue for a simulated one.
        gpu_id: the catalogue's id; None for a card that it does not know.
        total_bytes: what the driver says that it has [bytes].
        used_by_others_bytes: what other processes hold on it now [bytes].
    """

    device: str
    gpu: str
    gpu_id: str | None
    total_bytes: int | None = None
    used_by_others_bytes: int = 0
    driver: str | None = None

    @property
    def origin(self) -> Origin:
        """What records from here are."""
        return "measured" if self.device == "cuda" else "simulated"

    def versions(self, case: Case) -> dict[str, str]:
        """Return the versions of the packages that a case runs, where they are installed."""
        names = (*STACK, *case.libraries)
        found = {_DISTRIBUTIONS.get(name, name): version(name) for name in names}
        return {name: each for name, each in found.items() if each is not None}

    def identity(self, case: Case) -> str:
        """Return the id of a case's record: of what is asked, the device and the software."""
        parts = [canonical(case), self.device, self.gpu_id or self.gpu]
        parts += [f"{name}=={each}" for name, each in sorted(self.versions(case).items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_ID_CHARACTERS]

    def file_name(self) -> str:
        """Return the name of the file for this device and software."""
        stem = file_stem(self.gpu_id or self.gpu, version("torch"), version("transformers"))
        return f"{stem}.jsonl"


@lru_cache(maxsize=64)
def version(package: str) -> str | None:
    """Return the version of an installed package; it is not imported."""
    try:
        return metadata.version(_DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        return None


def stand(device: str, gpu: str | None) -> Stand:
    """Return where cases run, without touching the GPU.

    Args:
        gpu: the card to simulate, for the simulated device.

    Raises:
        NoDriverError: there is no GPU.
        MissingDependencyError: torch or transformers is not installed.
        UnknownGpuError: the card to simulate is not in the catalogue.
    """
    if absent := [name for name in STACK if version(name) is None]:
        raise MissingDependencyError(
            f"a campaign needs {', '.join(absent)} in this Python; pip install 'vramplan[profiler]'"
        )
    if device == "simulated":
        card = find_gpu(gpu or "h100-80gb-sxm5")
        return Stand(device, f"simulated {card.name}", card.key, card.usable_bytes)
    try:
        live = probe(_first_visible())
    except NoDriverError:
        raise NoDriverError(
            "no NVIDIA driver answered on this machine; run the campaign on one with a GPU, or try "
            "it here with --device simulated --out FILE"
        ) from None
    try:
        known: str | None = find_gpu(live.name).key
    except UnknownGpuError:
        known = None
    return Stand(device, live.name, known, live.total_bytes, live.used_by_others_bytes, live.driver)


def _first_visible() -> int:
    """Return the index of the GPU that CUDA sees first, where the environment gives a number."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(first) if first.isdecimal() else 0


class Results:
    """One file of records.

    Args:
        path: made with its folder when the first record comes.
        stand: where the cases run.
    """

    def __init__(self, path: Path, stand: Stand) -> None:
        self.path = path
        self._stand = stand

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other campaigns out of this file, and mend it where a crash has cut it off.

        Raises:
            InvalidRequestError: another campaign writes it, or it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab+")
        except OSError as error:
            raise InvalidRequestError(f"cannot write {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InvalidRequestError(
                    f"another campaign writes {self.path}; wait for it, or name another --out"
                ) from None
            try:
                self.mend()
                yield
            finally:
                if not self.path.stat().st_size:
                    self.path.unlink()

    def mend(self) -> None:
        """End a last line that lacks its end, or take it away where it is no record.

        Only while no process is within a case: its line may be half written.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, newline, rest = content.rpartition(b"\n")
        if not rest:
            return
        if _record(rest) is None:
            os.truncate(self.path, len(whole) + len(newline))
        else:
            with self.path.open("ab") as file:
                file.write(b"\n")

    def records(self) -> tuple[Record, ...]:
        """Return what is in the file."""
        return read(self.path) if self.path.exists() else ()

    def outcomes(self) -> dict[str, str]:
        """Return how each record ended, by id."""
        return {each.id: each.outcome for each in self.records()}

    def outcome(self, name: str) -> str | None:
        """Return how the record with this id ended; None where there is none.

        A last line without an end may be half written, and is not looked at.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.rpartition(b"\n")[0].splitlines()
        found = (_record(line) for line in lines if name.encode() in line)
        return next((each.outcome for each in found if each is not None and each.id == name), None)

    def forget_errors(self, ids: Collection[str]) -> None:
        """Take the errors of these cases out of the file, so that they are run again."""
        kept = [each for each in self.records() if each.outcome != "error" or each.id not in ids]
        # In place: the lock is on this very file.
        content = b"".join(map(encode, kept))
        with self.path.open("r+b") as file:
            file.write(content)
            file.truncate()

    def add_error(self, case: Case, group: str, reason: str) -> None:
        """Append the record of a case that gave none itself."""
        append(self.path, self._error(case, group, reason))

    def _error(self, case: Case, group: str, reason: str) -> Record:
        common: dict[str, Any] = {
            "id": self._stand.identity(case),
            "origin": self._stand.origin,
            "group": group,
            "outcome": "error",
            "reason": reason,
            "recorded_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "environment": Environment(
                gpu=self._stand.gpu,
                gpu_id=self._stand.gpu_id,
                driver=self._stand.driver,
                versions=self._stand.versions(case),
            ),
        }
        if case.probe is not None:
            return Probe(name=case.probe, arguments=dict(case.arguments), **common)
        return Run(request=whole(case, self._stand), limit_bytes=case.limit_bytes, **common)


def _record(line: bytes) -> Record | None:
    try:
        found: Record = msgspec.json.decode(line, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found


def whole(case: Case, stand: Stand) -> dict[str, Any]:
    """Return a case's request for this card, with its defaults; one that is refused as it is."""
    document = dict(case.request or {})
    if stand.gpu_id is not None:
        document = {"hardware": {"gpu": stand.gpu_id}, **document}
    try:
        return parse_request(document).to_dict()
    except EstimatorError:
        return document


def checked_output(path: Path | None, stand: Stand) -> Path:
    """Return the file to write.

    Raises:
        InvalidRequestError: a simulated campaign without a file of its own, or among measurements.
    """
    if stand.device == "cuda":
        if path is None and not MEASUREMENTS.is_dir():
            raise InvalidRequestError(
                "this is no checkout with data/measurements; name a file with --out"
            )
        return path or MEASUREMENTS / stand.file_name()
    if path is None:
        raise InvalidRequestError(
            "a simulated campaign has no place among the measurements; name a file with --out"
        )
    parts = path.resolve().parent.parts
    if any(pair == ("data", "measurements") for pair in pairwise(parts)):
        raise InvalidRequestError(
            f"{path} lies in data/measurements, where simulated records have no place; name "
            "another --out"
        )
    return path
