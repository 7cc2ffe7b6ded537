"""Measure one request on a device in a process of its own: `python -m profiler.measure FILE`.

Needs torch, transformers and what the recipe uses; of this project's own requirements none, because
a stand-in answers for msgspec where that is missing. `estimate measure` is the same with flags and
a summary. Nothing of the estimator is imported before the stand-in had its chance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from profiler.plain_structs import install_if_missing

if TYPE_CHECKING:
    from estimator.record import Record

DEVICES: Final = ("cuda", "simulated")
MIN_STEPS: Final = 3
_NAME: Final = "profiler.measure"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line, as every command of this project does."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_NAME,
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
    install_if_missing()
    from estimator.errors import CannotEstimateError, EstimatorError
    from profiler.measurement import one_line

    try:
        _write(_record(asked), asked.append)
    except EstimatorError as error:
        print(f"{_NAME}: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"{_NAME}: needs {error.name!r}, which is not installed", file=sys.stderr)
        return CannotEstimateError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _record(asked: argparse.Namespace) -> Record:
    from estimator.catalog import Access, find_gpu
    from estimator.errors import InvalidRequestError
    from estimator.request import parse_request
    from estimator.request_file import read_request_document
    from estimator.service import model_config, requested_gpu
    from profiler.measurement import Options, device_named, measure, on_card

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
    from estimator.errors import InvalidRequestError

    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"--arguments is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequestError("--arguments needs a JSON object")
    return found


def _write(record: Record, path: Path | None) -> None:
    """Append a record to a file, or write it to standard output.

    Raises:
        InvalidRequestError: the file cannot be written.
    """
    from estimator.errors import InvalidRequestError
    from estimator.record import append, encode

    if path is None:
        sys.stdout.buffer.write(encode(record))
        sys.stdout.flush()
        return
    try:
        append(path, record)
    except OSError as error:
        raise InvalidRequestError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    _code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At a regular end Triton's bindings list what they leak, below our own last line.
    os._exit(_code)
