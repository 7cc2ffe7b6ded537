"""Measure one request on a device in a process of its own: `python -m profiler.measure FILE`.

Needs torch, transformers and what the recipe uses; of this project's own requirements only those of
the core. `estimate measure` is the same with flags and a summary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NoReturn

from msgspec.structs import replace

from estimator.catalog import Access, Gpu, find_gpu
from estimator.errors import (
    CannotEstimateError,
    EstimatorError,
    InvalidRequestError,
    UnsupportedCombinationError,
)
from estimator.record import Outcome, Record, Run, append, encode
from estimator.request import EstimateRequest, parse_request
from estimator.request_file import read_request_document
from estimator.service import model_config, requested_gpu
from profiler.device import Cuda, Device, Simulated
from profiler.gauge import Gauge

MIN_STEPS: Final = 3
DEVICES: Final = ("cuda", "simulated")
_MAX_REASON: Final = 400


@dataclass(frozen=True, slots=True)
class Options:
    """How one request or one probe is measured.

    Args:
        steps: optimizer steps to run.
        limit_bytes: what the allocator may hold; None for the whole device.
        snapshot: where torch's history of allocations goes.
        lock: held while the device is used, so that the next process can prepare meanwhile.
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
    with device.prepared(request, config) as train, locked(options.lock):
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


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold a file's exclusive lock, after waiting for whoever holds it; None locks nothing."""
    if path is None:
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
        name: one of `DEVICES`.
        gpu: the card to simulate.
    """
    return Cuda() if name == "cuda" else Simulated(gpu)


def on_card(request: EstimateRequest, name: str) -> EstimateRequest:
    """Return a request for a card of the catalogue."""
    return replace(request, hardware=replace(request.hardware, gpu=find_gpu(name).key))


def write(record: Record, path: Path | None) -> None:
    """Append a record to a file, or write it to standard output.

    Raises:
        InvalidRequestError: the file cannot be written.
    """
    if path is None:
        sys.stdout.buffer.write(encode(record))
        sys.stdout.flush()
        return
    try:
        append(path, record)
    except OSError as error:
        raise InvalidRequestError(f"cannot write {path}: {error.strerror}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line, as every command of this project does."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="profiler.measure",
        description="Measure one request, or one probe, on the GPU of this machine.",
        epilog="Exit codes: 0 a record was written, out of memory or not; 2 usage or request "
        "error; 3 the recipe cannot be run here.",
        allow_abbrev=False,
    )
    parser.add_argument("request", nargs="?", help="request document; - is standard input")
    parser.add_argument("--probe", metavar="NAME", help="look at the device itself instead")
    parser.add_argument("--arguments", metavar="JSON", default="{}", help="of the probe")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the record to a file")
    parser.add_argument("--group", default="single", help="the campaign that the record is of")
    parser.add_argument("--id", help="of the record; made up when it is not given")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--gpu", metavar="ID", help="the card to simulate")
    parser.add_argument("--memory-limit", type=_bytes, metavar="BYTES", help="of the allocator")
    parser.add_argument("--steps", type=_steps, default=MIN_STEPS)
    parser.add_argument("--snapshot", type=Path, metavar="FILE", help="torch's history, .pickle.gz")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="held while the device is used")
    return parser


def _bytes(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of bytes above 0")
    return number


def _steps(text: str) -> int:
    number = int(text)
    if number < MIN_STEPS:
        raise argparse.ArgumentTypeError(
            f"{text} is fewer than {MIN_STEPS}: the first step has no optimizer states before it"
        )
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the module's command; return its exit code."""
    asked = _parser().parse_args(arguments)
    try:
        write(_record(asked), asked.append)
    except EstimatorError as error:
        print(f"profiler.measure: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        # Of this project's own, only the reader of YAML may be missing.
        print(f"profiler.measure: needs {error.name!r}, which is not installed", file=sys.stderr)
        return CannotEstimateError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _record(asked: argparse.Namespace) -> Record:
    options = Options(
        steps=asked.steps,
        limit_bytes=asked.memory_limit,
        snapshot=asked.snapshot,
        lock=asked.lock,
        id=asked.id,
        group=asked.group,
    )
    if (asked.request is None) == (asked.probe is None):
        raise InvalidRequestError("name a request document, or a probe with --probe, and not both")
    if asked.gpu is not None and asked.device != "simulated":
        raise InvalidRequestError("--gpu names the card to simulate; add --device simulated")
    if asked.probe is not None:
        from profiler.probes import measured

        card = find_gpu(asked.gpu) if asked.gpu is not None else None
        device = device_named(asked.device, card)
        return measured(asked.probe, _probe_arguments(asked.arguments), device, options)
    request = parse_request(read_request_document(asked.request))
    if asked.gpu is not None:
        request = on_card(request, asked.gpu)
    gpu = requested_gpu(request) if asked.device == "simulated" else None
    config = dict(model_config(request, Access.LOCAL).config)
    return measure(request, config, device_named(asked.device, gpu), options)


def _probe_arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"--arguments is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequestError("--arguments needs a JSON object")
    return found


if __name__ == "__main__":
    sys.exit(main())
