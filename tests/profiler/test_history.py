"""Histories recorded on GPUs: the model of the allocator predicts every exchange with the driver.

The recordings are others' (`histories/README.md`); the numbers of the table were counted in their
snapshots.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace as changed

from estimator.errors import MalformedDocumentError
from estimator.memory import caching_allocator
from estimator.units import KiB, MiB
from profiler import history as fixture
from profiler.history import Event, History
from profiler.history_replay import replay, room
from profiler.replay_cli import replay as command

HERE = Path(__file__).parent
HISTORIES = HERE / "histories"

# Of each recording: allocations; segments taken or mapped; given back or unmapped.
RECORDED = {
    "attention_only": (36, 9, 0),
    "expandable_segments": (2434, 175, 0),
    "expandable_segments_large": (392, 78, 0),
    "expandable_segments_out_of_memory": (199, 40, 6),
    "forward_emptied_cache": (3020, 178, 742),
    "full_step_emptied_cache": (6770, 782, 430),
    "qlora_step": (3505, 152, 0),
    "ten_streams_out_of_room": (3058, 584, 579),
    "training_in_the_middle": (7591, 1, 0),
}


def history(name: str) -> History:
    return fixture.read(HISTORIES / f"{name}.jsonl.gz")


def test_every_fixture_is_in_the_table_and_in_the_page_of_where_they_are_from():
    page = (HISTORIES / "README.md").read_text("utf-8")
    names = {path.name.removesuffix(".jsonl.gz") for path in HISTORIES.glob("*.gz")}
    assert names == RECORDED.keys()
    for name in names:
        with gzip.open(HISTORIES / f"{name}.jsonl.gz") as file:
            repository, rest = json.loads(file.readline())["provenance"].split(", ", 1)
        commit = rest.partition(" at ")[2].split(",")[0]
        assert f"`{name}`" in page
        assert repository.removeprefix("github.com/") in page
        assert len(commit) == 40
        assert commit in page


def test_the_documentation_counts_what_the_recordings_hold():
    text = " ".join((HERE.parents[1] / "docs" / "measuring.md").read_text("utf-8").split())
    allocations = sum(each[0] for each in RECORDED.values())
    exchanges = sum(each[1] + each[2] for each in RECORDED.values())
    counted = f"{allocations:,} allocations and {exchanges:,} exchanges with the driver"
    assert counted.replace(",", " ") in text


def test_a_fixture_holds_no_address_and_no_path():
    for path in HISTORIES.glob("*.gz"):
        _, start, end, *events = [
            json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()
        ]
        numbers = [number for line in events for number in line[1:]]
        assert max(numbers) < 2**36
        assert {line[0] for line in events} <= {*fixture.KINDS, "free"}
        assert all(len(segment) == 6 for segment in (*start, *end))


@pytest.mark.parametrize("name", RECORDED)
def test_every_exchange_with_the_driver_and_every_block_is_predicted(name):
    allocations, taken, given_back = RECORDED[name]
    found = replay(history(name))
    assert found.difference is None
    assert found.allocations == allocations
    assert found.exchanges == taken + given_back


def test_one_capacity_of_the_driver_explains_every_release_of_the_cache():
    recorded = history("ten_streams_out_of_room")
    found = replay(recorded)
    assert found.releases == 39
    # What was held at most, and the least that the driver refused.
    assert found.room == room(recorded)
    assert found.room is not None
    assert (found.room.at_least, found.room.below) == (21_476 * MiB, 21_512 * MiB)


@pytest.mark.parametrize("share", [0.999, 1.002])
def test_another_capacity_releases_the_cache_at_other_moments(monkeypatch, share):
    recorded = history("ten_streams_out_of_room")
    right = room(recorded)
    assert right is not None
    wrong = changed(right, at_least=int(right.at_least * share))
    monkeypatch.setattr("profiler.history_replay.room", lambda _: wrong)
    found = replay(recorded)
    # Told of the releases, the model goes through; by the wrong capacity it does not.
    assert (found.difference, found.room) == (None, None)


def test_a_release_that_was_asked_for_has_no_capacity():
    assert room(history("full_step_emptied_cache")) is None
    assert room(history("qlora_step")) is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("attention_only", {"large_segment_bytes": 24 * MiB}),
        ("attention_only", {"roundup_power2_divisions": 4}),
        ("qlora_step", {"large_segment_bytes": 22 * MiB}),
        ("qlora_step", {"expandable_segments": True}),
        ("full_step_emptied_cache", {"max_split_size_bytes": 32 * MiB}),
        ("expandable_segments", {"expandable_segments": False}),
        ("expandable_segments", {"large_segment_bytes": 22 * MiB}),
    ],
)
def test_other_settings_than_those_of_the_device_are_found_out(name, settings):
    recorded = history(name)
    found = replay(changed(recorded, settings=changed(recorded.settings, **settings)))
    assert found.difference is not None


@pytest.mark.parametrize(
    ("constant", "value", "name"),
    [
        ("SMALL_REQUEST_BYTES", 512 * KiB, "qlora_step"),
        ("SMALL_REQUEST_BYTES", 2 * MiB, "training_in_the_middle"),
        ("MIN_LARGE_REQUEST_BYTES", 8 * MiB, "full_step_emptied_cache"),
        ("LARGE_ROUNDING_BYTES", 4 * MiB, "qlora_step"),
        ("SMALL_SEGMENT_BYTES", 4 * MiB, "ten_streams_out_of_room"),
        ("MIN_BLOCK_BYTES", 1024, "expandable_segments"),
    ],
)
def test_a_wrong_constant_of_the_model_is_found_out(monkeypatch, constant, value, name):
    recorded = history(name)
    monkeypatch.setattr(caching_allocator, constant, value)
    assert replay(recorded).difference is not None


def test_a_model_that_takes_the_largest_block_is_found_out(monkeypatch):
    best_fit = caching_allocator.bisect_left

    def worst_fit(free, wanted):
        looks_for_a_size = len(wanted) == 1
        at = best_fit(free, wanted)
        return len(free) - 1 if looks_for_a_size and at < len(free) else at

    monkeypatch.setattr(caching_allocator, "bisect_left", worst_fit)
    assert replay(history("qlora_step")).difference is not None


def test_a_difference_is_told_with_what_went_before():
    recorded = history("attention_only")
    at = next(number for number, each in enumerate(recorded.events) if each.kind == "alloc")
    event = recorded.events[at]
    larger = event._replace(size=event.size + 40 * MiB)
    events = (*recorded.events[:at], larger, *recorded.events[at + 1 :])
    difference = replay(changed(recorded, events=events)).difference
    assert difference is not None
    assert difference.number == at
    assert difference.recorded == str(recorded.events[at - 1])
    assert "segment_alloc of 4" in difference.predicted
    assert difference.before[-1] == str(recorded.events[at - 1])


@pytest.mark.parametrize("kind", ["segment_alloc", "segment_free"])
def test_an_exchange_more_or_less_is_found_out(kind):
    recorded = history("ten_streams_out_of_room")
    at = next(number for number, each in enumerate(recorded.events) if each.kind == kind)
    missing = (*recorded.events[:at], *recorded.events[at + 1 :])
    twice = (*recorded.events[:at], recorded.events[at], *recorded.events[at:])
    for events in (missing, twice):
        assert replay(changed(recorded, events=events)).difference is not None


def test_another_end_than_the_device_had_is_found_out():
    recorded = history("qlora_step")
    last = recorded.end[-1]
    other = changed(last, blocks=(changed(last.blocks[0], state="active_awaiting_free"),))
    found = replay(changed(recorded, end=(*recorded.end[:-1], other)))
    assert found.difference is not None
    assert "at the end" in found.difference.recorded


def test_a_fixture_reads_back_as_it_was_written_and_is_the_same_bytes(tmp_path):
    recorded = history("expandable_segments_out_of_memory")
    one, other = tmp_path / "one.gz", tmp_path / "other.gz"
    fixture.write(one, recorded, "somebody")
    fixture.write(other, fixture.read(one), "somebody")
    assert fixture.read(one) == recorded
    assert one.read_bytes() == other.read_bytes()
    assert Counter(each.kind for each in recorded.events)["oom"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        gzip.compress(b"text", mtime=0),
        gzip.compress(b'{"format":"other/v1"}\n[]\n[]\n', mtime=0),
        gzip.compress(b'{"format":"allocator-history/v1"}\n[]\n[]\n', mtime=0),
        gzip.compress(b'{"format":"allocator-history/v1","settings":{}}\n[1]\n[]\n', mtime=0),
        (HISTORIES / "attention_only.jsonl.gz").read_bytes()[:300],
    ],
    ids=("nothing", "text", "packed text", "other", "short", "no events", "cut off"),
)
def test_what_is_no_fixture_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(MalformedDocumentError) as refused:
        fixture.read(path)
    assert "bad.jsonl.gz" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_event_is_told_by_segment_and_offset():
    event = Event("alloc", 3, 512, 0, 2 * fixture.SPAN + 1024)
    assert str(event) == "alloc of 512 bytes at segment 2 + 1024"


def test_the_command_tells_what_it_predicted_and_exits_with_0():
    outcome = CliRunner().invoke(command, [str(HISTORIES / "ten_streams_out_of_room.jsonl.gz")])
    assert outcome.output == (
        "device 0: 10327 events, all predicted: 3058 allocations where the device put them, 1163 "
        "exchanges with the driver, 39 releases of the cache; at most 20.97 GiB reserved\n"
        "the driver had 20.97 GiB to 21.01 GiB: told that, the model releases the cache at the "
        "same moments\n"
    )


def test_without_click_and_msgspec_it_runs_as_a_module(tmp_path):
    recorded = history("attention_only")
    wrong = tmp_path / "wrong.jsonl.gz"
    settings = changed(recorded.settings, roundup_power2_divisions=4)
    fixture.write(wrong, changed(recorded, settings=settings), "")
    hidden = "import sys, runpy; sys.modules['msgspec'] = sys.modules['click'] = None\n"
    run = "runpy.run_module('profiler.history', run_name='__main__')"
    for path, code, said in (
        (HISTORIES / "attention_only.jsonl.gz", 0, "97 events, all predicted"),
        (wrong, 1, "differs"),
        (HISTORIES / "README.md", 2, ""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"{hidden}sys.argv[1:] = [{str(path)!r}]\n{run}"],
            capture_output=True,
            encoding="utf-8",
            check=False,
            cwd=HERE.parents[1],
        )
        assert (done.returncode, done.stderr.count("\n")) == (code, code == 2)
        assert said in done.stdout
