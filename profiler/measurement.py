"""Measure one request: prepare without the device, then run its steps and read the meters."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Final

from msgspec.structs import replace

from estimator.catalog import Gpu, find_gpu
from estimator.errors import EstimatorError, UnsupportedCombinationError
from estimator.record import Outcome, Run
from estimator.request import EstimateRequest
from profiler.device import Cuda, Device, Simulated
from profiler.gauge import Gauge
from profiler.measure import MIN_STEPS

_MAX_REASON: Final = 400

# Open files whose locks this process holds.
_held: Final[list[IO[str]]] = []


@dataclass(frozen=True, slots=True)
class Options:
    """How one request or one probe is measured.

    Args:
        steps: optimizer steps to run.
        limit_bytes: what the allocator may hold; None for the whole device.
        snapshot: where torch's history of allocations goes.
        lock: held from before the device is used until the process ends; the next process can
            prepare meanwhile.
        id: of the record; None makes one.
        group: the campaign that the record belongs to.
    """

    steps: int = MIN_STEPS
    limit_bytes: int | None = None
    snapshot: Path | None = None
    lock: Path | None = None
    id: str | None = None
    group: str = "single"

    def new_id(self) -> str:
        """Return the id of the record."""
        return self.id or uuid.uuid4().hex[:16]


def measure(
    request: EstimateRequest, config: dict[str, Any], device: Device, options: Options
) -> Run:
    """Run the training step of a request on a device and read the meters.

    Args:
        request: one single-GPU run.
        config: the model's config.json.
        device: used by nobody before, and by nobody else meanwhile.
        options: how many steps, within which limit.

    Raises:
        EstimatorError: the run is not supported, refused by the real stack, or there is no device.
    """
    device.check()
    gauge = Gauge(device)
    outcome: Outcome = "ok"
    reason = None
    with device.prepared(request, config) as train:
        hold_lock(options.lock)
        try:
            device.open(options.limit_bytes)
            if options.snapshot is not None:
                device.record_history()
            train(gauge, options.steps)
        except EstimatorError:
            raise
        except Exception as error:
            if not device.ran_out(error):
                raise refusal(error) from error
            outcome, reason = "out_of_memory", one_line(error)
        gauge.close()
        if options.snapshot is not None:
            device.write_history(options.snapshot)
        environment = device.environment()
    return Run(
        id=options.new_id(),
        origin=device.origin,
        group=options.group,
        request=request.to_dict(),
        outcome=outcome,
        reason=reason,
        limit_bytes=options.limit_bytes,
        steps=gauge.steps,
        peak=gauge.peak,
        phases=gauge.phases,
        idle_bytes=device.idle_bytes,
        step_seconds=tuple(gauge.seconds),
        environment=environment,
        recorded_at=now(),
    )


def refusal(error: Exception) -> EstimatorError:
    """Return what the user is told of an error inside the stack, which has many ways to fail."""
    return UnsupportedCombinationError(
        f"this does not run here: {type(error).__name__}: {one_line(error)}"
    )


def hold_lock(path: Path | None) -> None:
    """Take a file's exclusive lock, after waiting for whoever holds it; None takes none.

    It is held until this process ends: only then is all of its device memory free again.
    """
    if path is None:
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    fcntl.flock(file, fcntl.LOCK_EX)
    _held.append(file)


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} ..."


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def device_named(name: str, gpu: Gpu | None) -> Device:
    """Return a device by the name that a command gives it.

    Args:
        name: `cuda` or `simulated`.
        gpu: the card to simulate.
    """
    return Cuda() if name == "cuda" else Simulated(gpu)


def on_card(request: EstimateRequest, name: str) -> EstimateRequest:
    """Return a request for a card of the catalogue."""
    return replace(request, hardware=replace(request.hardware, gpu=find_gpu(name).key))
