"""Measurement records: what was run, on what, and what the meters read.

A record is one line of JSON. Those of our own campaigns lie in `data/measurements/`, those made of
published rows in `data/published/records.jsonl`. Calibration, the accuracy page and the Trainer
callback read and write nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from estimator.errors import InvalidRecordError
from estimator.section import SizeBytes

SCHEMA: Final = "measurement/v1"

Meter = Literal["allocated", "reserved", "device-used"]
Origin = Literal["measured", "published", "simulated"]
Outcome = Literal["ok", "out_of_memory", "error"]


class Meters(Struct, frozen=True, omit_defaults=True):
    """What each meter read at its highest [bytes]; None where it was not read.

    Args:
        allocated_bytes: `torch.cuda.max_memory_allocated`.
        requested_bytes: `torch.cuda.memory_stats()["requested_bytes.all.peak"]`.
        reserved_bytes: `torch.cuda.max_memory_reserved`.
        device_used_bytes: total less free memory of the device, less what others used before.
    """

    allocated_bytes: SizeBytes | None = None
    requested_bytes: SizeBytes | None = None
    reserved_bytes: SizeBytes | None = None
    device_used_bytes: SizeBytes | None = None


class PhasePeak(Struct, frozen=True):
    """The meters' highest values within one phase of the steady step."""

    phase: str
    peak: Meters


class Environment(Struct, frozen=True, omit_defaults=True):
    """The device and the software of a record; None where it is not known.

    Args:
        gpu: the name that the driver gives.
        gpu_id: the catalogue's id of that card.
        total_bytes: what the driver offers on it [bytes].
        versions: of every library that was run, by the name of its package.
        allocator: the value of `PYTORCH_ALLOC_CONF`, or of its older name.
    """

    gpu: str | None = None
    gpu_id: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None
    total_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None
    python: str | None = None
    versions: dict[str, str] = {}
    allocator: str = ""


class Run(Struct, frozen=True, tag_field="record", tag="run", kw_only=True):
    """One training run and what it needed.

    Args:
        id: names the record; unique in its file.
        origin: measured on a device, published by somebody else, or simulated for a test.
        group: the campaign or the publication that it came out of.
        request: the whole request document.
        outcome: whether it ran through; `reason` says why it did not, in one line.
        limit_bytes: what the process was allowed to hold, where that was less than the device.
        steps: how many optimizer steps were run.
        peak: over all steps, first and last included.
        phases: of the last step.
        idle_bytes: device memory in use by the process before its first tensor: the CUDA context.
        step_seconds: of every step, the first and slower one included.
        recorded_at: the time in UTC, ISO 8601.
    """

    schema: Literal["measurement/v1"] = SCHEMA
    id: str
    origin: Origin
    group: str
    request: dict[str, Any]
    outcome: Outcome
    reason: str | None = None
    limit_bytes: SizeBytes | None = None
    steps: int = 0
    peak: Meters = Meters()
    phases: tuple[PhasePeak, ...] = ()
    idle_bytes: SizeBytes | None = None
    step_seconds: tuple[float, ...] = ()
    environment: Environment = Environment()
    recorded_at: str | None = None


class Probe(Struct, frozen=True, tag_field="record", tag="probe", kw_only=True):
    """One look at the device itself: a constant, or the transient of one kernel.

    Args:
        name: what was looked at, one of `profiler.probes.PROBES`.
        arguments: the shape that it was looked at with.
        values: what was found, by name [bytes].
    """

    schema: Literal["measurement/v1"] = SCHEMA
    id: str
    origin: Origin
    group: str
    name: str
    arguments: dict[str, Any]
    outcome: Outcome
    reason: str | None = None
    values: dict[str, int] = {}
    environment: Environment = Environment()
    recorded_at: str | None = None


Record = Run | Probe


def encode(record: Record) -> bytes:
    """Return a record as one line of JSON."""
    return msgspec.json.encode(record) + b"\n"


def append(path: Path, record: Record) -> None:
    """Add one record to a file, in one write, so that a crash leaves no half line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, encode(record))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[Record, ...]:
    """Return the records of one file.

    Raises:
        InvalidRecordError: a line is no record; the message names it.
    """
    return tuple(_records(path))


def runs(records: Iterable[Record]) -> tuple[Run, ...]:
    """Return the training runs among the records."""
    return tuple(each for each in records if isinstance(each, Run))


def probes(records: Iterable[Record]) -> tuple[Probe, ...]:
    """Return the probes among the records."""
    return tuple(each for each in records if isinstance(each, Probe))


def _records(path: Path) -> Iterator[Record]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidRecordError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=Record)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRecordError(
                f"{path}, line {number}: not a measurement record: {error}"
            ) from error
