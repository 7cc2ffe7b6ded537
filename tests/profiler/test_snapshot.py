"""Reading snapshots: from any moment of a run, in any version's form, and from nobody's code.

The snapshots here are simulated by the model of the allocator itself, to test the reader; what the
model is worth is tested with recordings of GPUs (`test_history.py`).
"""

from __future__ import annotations

import copy
import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import EstimatorError, MalformedDocumentError
from estimator.memory.caching_allocator import (
    AllocationEvent,
    AllocatorSettings,
    CachingAllocator,
    Segment,
    apply,
)
from estimator.units import MiB
from profiler import snapshot as reader
from profiler.history_replay import replay
from profiler.recording import CannotReplayError
from profiler.replay_cli import replay as command
from tests.estimator.memory.test_caching_allocator_properties import SETTINGS, traces

STREAMS = (0, 94_000_123_568)


class Simulated:
    """A run of the model that keeps what PyTorch would record of it."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self.allocator = CachingAllocator(settings=settings)
        self.trace: list[dict[str, Any]] = []
        self.sizes: dict[int, tuple[int, int, int]] = {}
        self.waiting: list[int] = []

    def run(self, event: AllocationEvent) -> None:
        before = len(self.allocator.segment_events)
        if event.kind == "empty_cache":
            for key in self.waiting:
                self._record("free_completed", *self.sizes.pop(key))
            self.waiting = []
        given = None
        if event.kind == "alloc":
            given = self.allocator.malloc(event.key, event.size_bytes, event.stream)
        else:
            apply(self.allocator, event)
        for each in self.allocator.segment_events[before:]:
            self._record(each.kind, each.address, each.size_bytes, each.stream)
        if given is not None and event.size_bytes:
            self.sizes[event.key] = (given.address, event.size_bytes, event.stream)
            self._record("alloc", *self.sizes[event.key])
        elif event.kind in ("free", "free_requested") and event.key in self.sizes:
            self._record("free_requested", *self.sizes[event.key])
            if event.kind == "free":
                self._record("free_completed", *self.sizes.pop(event.key))
            else:
                self.waiting.append(event.key)

    def _record(self, kind: str, address: int, size: int, stream: int) -> None:
        self.trace.append(
            {"action": kind, "addr": address, "size": size, "stream": STREAMS[stream], "frames": []}
        )

    def snapshot(self) -> dict[str, Any]:
        settings = self.allocator.settings
        divisions = settings.roundup_power2_divisions
        return {
            "segments": [_segment(each) for each in self.allocator.segments()],
            "device_traces": [[], self.trace],
            "allocator_settings": {
                "expandable_segments": settings.expandable_segments,
                "max_split_size": settings.max_split_size_bytes or -1,
                "garbage_collection_threshold": 0.0,
                "roundup_power2_divisions": {str(1 << step): divisions for step in range(16)},
            },
        }


def _segment(segment: Segment) -> dict[str, Any]:
    return {
        "device": 1,
        "address": segment.address,
        "total_size": segment.size_bytes,
        "stream": STREAMS[segment.stream],
        "segment_type": "small" if segment.is_small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.is_expandable,
        "blocks": [
            {
                "address": each.address,
                "size": each.size_bytes,
                "requested_size": each.requested_bytes,
                "state": each.state,
            }
            for each in segment.blocks
        ],
    }


def simulated(
    events: list[AllocationEvent], settings: AllocatorSettings, begin: int = 0
) -> dict[str, Any]:
    """Return the snapshot of a run of which the first events were not recorded."""
    run = Simulated(settings)
    for number, event in enumerate(events):
        if number == begin:
            run.trace.clear()
        run.run(event)
    return run.snapshot()


@given(traces(), SETTINGS, st.data())
def test_a_run_is_replayed_from_wherever_its_recording_begins(events, settings, data):
    begin = data.draw(st.integers(0, len(events) - 1))
    dumped = simulated(events, settings, begin)
    if reader.devices(dumped):
        assert replay(reader.history(dumped, 1)).difference is None


DEFAULT = AllocatorSettings()
RUN = [
    AllocationEvent("alloc", 1, 3 * MiB),
    AllocationEvent("alloc", 2, 700),
    AllocationEvent("free", 1),
    AllocationEvent("alloc", 3, 30 * MiB),
]


def written(path: Path, document: Any) -> Path:
    path.write_bytes(pickle.dumps(document))
    return path


def test_a_tail_that_was_not_split_off_is_a_part_of_a_block_that_was_there_before():
    # 10 MiB and 9.5 MiB in 20 MiB leave 0.5 MiB, which stays with the second.
    events = [
        AllocationEvent("alloc", 1, 10 * MiB - 512),
        AllocationEvent("alloc", 2, 9 * MiB + MiB // 2),
        AllocationEvent("free", 1),
        AllocationEvent("free", 2),
    ]
    begin = reader.history(simulated(events, DEFAULT, begin=2), 1).start
    assert [each.size_bytes for each in begin[0].blocks] == [10 * MiB - 512, 10 * MiB + 512]


def test_a_snapshot_of_an_old_version_has_no_settings_and_no_addresses_of_blocks():
    dumped = simulated(RUN, DEFAULT)
    del dumped["allocator_settings"]
    for segment in dumped["segments"]:
        for key in ("segment_pool_id", "is_expandable"):
            del segment[key]
        for block in segment["blocks"]:
            del block["address"]
    assert replay(reader.history(dumped, 1)).difference is None


def test_remarks_of_the_recording_are_passed_over():
    dumped = simulated(RUN, DEFAULT)
    remark = {"action": "snapshot", "addr": 0, "size": 0, "stream": 0}
    dumped["device_traces"][1].append(remark)
    assert len(reader.history(dumped, 1).events) == len(dumped["device_traces"][1]) - 1


class Called:
    """What a pickle of somebody else's may do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("called").touch, ())


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Called()),
        pickle.dumps({"device_traces": [[Called()]], "segments": []}),
        b"cos\nsystem\n(S'touch called'\ntR.",
        b"\x80\x04\x95",
        b"",
        b"{}",
        pickle.dumps([1]),
        pickle.dumps({"segments": []}),
        pickle.dumps({"device_traces": 3}),
        gzip.compress(pickle.dumps({"device_traces": [[1] * 9999]}), mtime=0)[:40],
    ],
)
def test_what_is_no_snapshot_is_refused_in_one_line_and_nothing_of_it_is_run(
    tmp_path, monkeypatch, content
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pickle"
    path.write_bytes(content)
    with pytest.raises(MalformedDocumentError) as refused:
        reader.load(path)
    assert "bad.pickle" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "called").exists()


def test_a_snapshot_may_be_packed(tmp_path):
    dumped = simulated(RUN, DEFAULT)
    path = tmp_path / "packed.pickle.gz"
    path.write_bytes(gzip.compress(pickle.dumps(dumped)))
    assert reader.history(reader.load(path), 1) == reader.history(dumped, 1)


def test_a_snapshot_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_SNAPSHOT_BYTES", 1000)
    path = written(tmp_path / "large.pickle", simulated(RUN, DEFAULT))
    with pytest.raises(MalformedDocumentError, match="record fewer events"):
        reader.load(path)


def _stopped_early(dumped: dict[str, Any]) -> None:
    dumped["segments"][0]["blocks"] = [
        {"address": dumped["segments"][0]["address"], "size": 20 * MiB, "state": "inactive"}
    ]
    dumped["segments"][1]["blocks"] = dumped["segments"][0]["blocks"]


def _graph(dumped: dict[str, Any]) -> None:
    dumped["segments"][0]["segment_pool_id"] = (0, 7)


def _collected(dumped: dict[str, Any]) -> None:
    dumped["allocator_settings"]["garbage_collection_threshold"] = 0.8


def _new_kind(dumped: dict[str, Any]) -> None:
    dumped["device_traces"][1][0]["action"] = "teleport"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_stopped_early, "while the recording still runs"),
        (_graph, "private pools"),
        (_collected, "garbage_collection_threshold"),
        (_new_kind, "'teleport'"),
    ],
)
def test_what_cannot_be_replayed_exactly_is_refused_with_the_reason(spoil, said):
    dumped = simulated(RUN, DEFAULT)
    spoil(dumped)
    with pytest.raises(CannotReplayError) as refused:
        reader.history(dumped, 1)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def _no_size(dumped: dict[str, Any]) -> None:
    del dumped["device_traces"][1][0]["size"]


def _negative(dumped: dict[str, Any]) -> None:
    dumped["device_traces"][1][0]["size"] = -1


def _text_for_a_number(dumped: dict[str, Any]) -> None:
    dumped["device_traces"][1][0]["size"] = "many"


def _no_blocks(dumped: dict[str, Any]) -> None:
    del dumped["segments"][0]["blocks"]


def _unknown_state(dumped: dict[str, Any]) -> None:
    dumped["segments"][0]["blocks"][0]["state"] = "asleep"


def _overlap(dumped: dict[str, Any]) -> None:
    dumped["segments"][-1]["blocks"][0]["size"] = 1 << 50


def _segments_gone(dumped: dict[str, Any]) -> None:
    dumped["segments"] = None


@pytest.mark.parametrize(
    "spoil",
    [
        _no_size, _negative, _text_for_a_number, _no_blocks, _unknown_state, _overlap,
        _segments_gone,
    ],
)  # fmt: skip
def test_what_pytorch_would_not_write_is_refused(spoil):
    dumped = simulated(RUN, DEFAULT)
    spoil(dumped)
    with pytest.raises(EstimatorError) as refused:
        reader.history(dumped, 1)
    assert "\n" not in str(refused.value)


def test_no_event_more_or_less_goes_by_unnoticed():
    dumped = simulated([*RUN, AllocationEvent("free", 3)], DEFAULT)
    for number in range(len(dumped["device_traces"][1])):
        spoiled = copy.deepcopy(dumped)
        del spoiled["device_traces"][1][number]
        kind = dumped["device_traces"][1][number]["action"]
        try:
            differs = replay(reader.history(spoiled, 1)).difference is not None
        except CannotReplayError:
            differs = True
        # A segment may as well have been there before.
        assert differs or kind == "segment_alloc"


def test_the_command_writes_a_fixture_of_one_device_only(tmp_path):
    dumped = simulated(RUN, DEFAULT)
    dumped["device_traces"][0] = [dict(each) for each in dumped["device_traces"][1]]
    dumped["segments"] += [{**each, "device": 0} for each in dumped["segments"]]
    path, out = written(tmp_path / "two.pickle", dumped), tmp_path / "out.jsonl.gz"
    refused = CliRunner().invoke(command, [str(path), "--write-fixture", str(out)])
    assert isinstance(refused.exception, EstimatorError)
    assert "--device" in str(refused.exception)
    assert not out.exists()
    done = CliRunner().invoke(command, [str(path), "--device", "0", "--write-fixture", str(out)])
    assert done.exit_code == 0
    again = CliRunner().invoke(command, [str(out)])
    assert again.output == done.output.replace("device 1", "device 0")


def test_a_device_without_events_is_refused(tmp_path):
    path = written(tmp_path / "one.pickle", simulated(RUN, DEFAULT))
    refused = CliRunner().invoke(command, [str(path), "--device", "0"])
    assert "devices with events: 1" in str(refused.exception)
    empty = written(tmp_path / "none.pickle", {"device_traces": [[]], "segments": []})
    assert "_record_memory_history" in str(CliRunner().invoke(command, [str(empty)]).exception)
