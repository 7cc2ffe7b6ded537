"""Measurement records: written line by line, read back whole, refused by line."""

from __future__ import annotations

import json

import pytest

from estimator.errors import InvalidRecordError
from estimator.record import (
    Environment,
    Meters,
    PhasePeak,
    Probe,
    Run,
    append,
    encode,
    probes,
    read,
    runs,
)

RUN = Run(
    id="a",
    origin="simulated",
    group="test",
    request={"model": "gpt2"},
    outcome="ok",
    steps=3,
    peak=Meters(allocated_bytes=3, reserved_bytes=4),
    phases=(PhasePeak("forward", Meters(allocated_bytes=2)),),
    step_seconds=(0.5, 0.25),
    environment=Environment(gpu="none", versions={"torch": "2.13.0"}),
)
PROBE = Probe(
    id="b",
    origin="simulated",
    group="test",
    name="context",
    arguments={},
    outcome="ok",
    values={"context_bytes": 5},
)


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    append(path, RUN)
    append(path, PROBE)
    assert read(path) == (RUN, PROBE)
    assert runs(read(path)) == (RUN,)
    assert probes(read(path)) == (PROBE,)


@pytest.mark.parametrize("line", [b"{", b'{"record": "run"}', b'{"record": "walk"}', b"\xff"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    append(path, RUN)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InvalidRecordError, match=r"records\.jsonl, line 2"):
        read(path)


@pytest.mark.parametrize("size", [-5, 10**30, "many"])
def test_a_size_that_no_memory_has_is_named(tmp_path, size):
    path = tmp_path / "records.jsonl"
    document = json.loads(encode(RUN))
    document["peak"]["allocated_bytes"] = size
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidRecordError, match=r"line 1.*allocated_bytes"):
        read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidRecordError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
