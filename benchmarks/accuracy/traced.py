"""Dry runs of the published rows whose answer does not depend on their software's age.

A dry run takes seconds and needs torch, so its results are kept in a file;
`python -m benchmarks.accuracy.traced` makes it again, and a test compares one row of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from benchmarks.accuracy.comparison import Answered, answers
from benchmarks.accuracy.meters import Meter
from benchmarks.accuracy.points import Point
from benchmarks.accuracy.published import measured
from estimator.catalog import Access
from estimator.errors import EstimatorError
from estimator.pipeline import answer
from estimator.request import EstimateRequest, Software, parse_request
from estimator.service import model_config, requested_gpu

FILE: Final = Path(__file__).with_name("traced.jsonl")
INSTALLED: Final = Software()


class Traced(Struct, frozen=True):
    """A dry run of a published row's request [bytes].

    Args:
        request: as it was run, with the installed software.
        versions: of the libraries that were run.
    """

    id: str
    request: dict[str, Any]
    allocated_bytes: int
    reserved_bytes: int
    device_used_bytes: int
    versions: dict[str, str]

    def bytes_of(self, meter: Meter) -> int:
        """Return what a meter would have read."""
        readings = {
            "allocated": self.allocated_bytes,
            "reserved": self.reserved_bytes,
            "device-used": self.device_used_bytes,
        }
        return readings[meter]


@dataclass(frozen=True, slots=True)
class Pair:
    """A reading beside the dry run of the same request."""

    point: Point
    traced: int

    @property
    def error(self) -> float:
        """The signed relative error of the dry run."""
        return self.traced / self.point.measured - 1


def traced_comparisons(points: Iterable[Point], traced: Sequence[Traced]) -> list[Pair]:
    """Return every reading whose request was traced."""
    known = [(each, parse_request(each.request)) for each in traced]
    found = []
    for point in points:
        wanted = replace(point.request, software=INSTALLED)
        hit = next((each for each, request in known if request == wanted), None)
        if hit is not None:
            found.append(Pair(point, hit.bytes_of(point.meter)))
    return found


def read(path: Path = FILE) -> tuple[Traced, ...]:
    """Return the dry runs of the file."""
    lines = path.read_bytes().splitlines()
    return tuple(msgspec.json.decode(line, type=Traced) for line in lines)


def candidates(runs: Iterable[Answered]) -> Iterator[tuple[str, EstimateRequest]]:
    """Yield the rows that count and that the installed software would run alike."""
    for run in runs:
        request = replace(run.request, software=INSTALLED)
        if not run.row.scored:
            continue
        if run.request.software != INSTALLED:
            model = model_config(request, Access.CATALOGUE)
            # What is allocated does not depend on the order of lengths, which takes long to replay.
            alike = replace(request, sample_lengths=())
            try:
                other = answer(alike, model.config, model.id, requested_gpu(request))
            except EstimatorError:
                continue
            if other.peak.allocated_bytes.expected != run.result.peak.allocated_bytes.expected:
                continue
        yield run.row.id, request


def _trace(name: str, request: EstimateRequest) -> Traced | None:
    from profiler.engine import dry_run

    try:
        result = dry_run(request, model_config(request, Access.CATALOGUE).config)
    except EstimatorError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None
    return Traced(
        id=name,
        request=request.to_dict(),
        allocated_bytes=result.peak.allocated_bytes.expected,
        reserved_bytes=result.peak.reserved_bytes.expected,
        device_used_bytes=result.peak.device_used_bytes.expected,
        versions={name: each for name, each in result.versions.items() if name != "vramplan"},
    )


def main() -> None:
    """Trace every candidate, and write the file."""
    lines = []
    for name, request in candidates(answers(measured()).answered):
        print(name, file=sys.stderr)
        found = _trace(name, request)
        if found is not None:
            lines.append(msgspec.json.encode(found) + b"\n")
    FILE.write_bytes(b"".join(lines))


if __name__ == "__main__":
    main()
