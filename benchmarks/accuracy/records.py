"""Published runs as measurement records, so that calibration reads one kind of file.

Only rows that count and that the request document can express become records; the recipe of each is
the rule of its source in `recipes.py`. Runs that failed become records without meters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.accuracy.comparison import Answered, Answers
from benchmarks.accuracy.meters import readings
from benchmarks.accuracy.published import PUBLISHED
from estimator.record import Environment, Meters, Run, encode

FILE: Final = PUBLISHED / "records.jsonl"


def records(measured: Answers, failed: Answers) -> Iterator[Run]:
    """Yield a record for every published run that counts and has an answer."""
    for run in measured.answered:
        if run.row.scored and (meters := _meters(run)) != Meters():
            yield _record(run, meters)
    for run in failed.answered:
        yield _record(run, None)


def write(measured: Answers, failed: Answers, path: Path = FILE) -> None:
    """Write the records of all published runs that have one."""
    path.write_bytes(b"".join(encode(each) for each in records(measured, failed)))


def _record(run: Answered, meters: Meters | None) -> Run:
    return Run(
        id=run.row.id,
        origin="published",
        group=run.row.source_group,
        request=run.request.to_dict(),
        outcome="out_of_memory" if meters is None else "ok",
        peak=meters or Meters(),
        environment=Environment(gpu=run.row.gpu, gpu_id=run.request.hardware.gpu),
    )


def _meters(run: Answered) -> Meters:
    values = {meter: round(value) for meter, value in readings(run.row)}
    return Meters(
        allocated_bytes=values.get("allocated"),
        reserved_bytes=values.get("reserved"),
        device_used_bytes=values.get("device-used"),
    )
