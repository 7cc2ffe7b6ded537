"""Trace files against the readers they are written for: torch's own tools and Perfetto's rules."""

from __future__ import annotations

import gzip
import json
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InvalidRequestError
from estimator.memory.caching_allocator import AllocatorSettings
from estimator.units import MiB
from profiler.trace_export import TraceEvent, chrome_trace, memory_snapshot, write_trace

# The opcodes that the viewer's unpickler knows: pytorch torch/utils/viz/MemoryViz.js::unpickle at
# commit 00067369c933; any other one stops it with an error.
VIEWER_OPCODES = {
    "PROTO", "APPEND", "APPENDS", "LIST", "TUPLE", "NEWFALSE", "NEWTRUE", "NONE", "BINGET",
    "BININT", "BININT1", "BININT2", "EMPTY_DICT", "EMPTY_LIST", "FRAME", "LONG1", "LONG_BINGET",
    "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "SETITEMS", "SETITEM", "DICT",
    "SHORT_BINUNICODE", "BINUNICODE", "STOP", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "BINFLOAT",
}  # fmt: skip


def event(kind: Any, key: int, size_mib: float, component: str, phase: str) -> TraceEvent:
    return TraceEvent(
        kind, key, int(size_mib * MiB), 0, component, phase, "model.layers.0.mlp", "aten.mm"
    )


TRACE = (
    event("alloc", 1, 43, "weights", "load"),
    event("alloc", 2, 3, "activations", "forward"),
    event("alloc", 3, 0.5, "activations", "forward"),
    event("alloc", 4, 0, "activations", "forward"),
    event("free", 2, 3, "activations", "backward"),
    event("free", 4, 0, "activations", "backward"),
    event("alloc", 5, 100, "gradients", "backward"),
)


def unchanged(text: str) -> str:
    """Stand in for the flame graph script, which torch would download."""
    return text


@pytest.mark.parametrize("expandable", [False, True])
def test_every_tool_of_torch_reads_the_snapshot(expandable: bool, tmp_path: Path) -> None:
    viz = pytest.importorskip("torch.cuda._memory_viz")
    path = tmp_path / "step.pickle"
    write_trace(path, TRACE, AllocatorSettings(expandable_segments=expandable))
    snapshot = pickle.loads(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in (viz.trace_plot, viz.segment_plot):
            assert "snapshot.pickle" in plot(snapshot)
    # segsum checks by itself that blocks add up to their segments; it prints what is allocated.
    assert "total_allocated: 143.5MiB" in viz.segsum(snapshot)
    lines = viz.memory(snapshot, format_flamegraph=unchanged).splitlines()
    weight = "phase:0:load;module:0:model;module:0:model.layers;module:0:model.layers.0;"
    assert any(weight in line and line.endswith(f" {43 * MiB}") for line in lines)
    assert viz.segments(snapshot, format_flamegraph=unchanged)
    assert "Device 0" in viz.trace(snapshot)


def test_torch_removes_exactly_the_pairs_that_were_freed() -> None:
    viz = pytest.importorskip("torch.cuda._memory_viz")
    kept = viz.filter_alloc_free_pairs(memory_snapshot(TRACE))["device_traces"][0]
    sizes = [entry["size"] // 2**19 for entry in kept if entry["action"] == "alloc"]
    assert sizes == [86, 1, 200]
    assert not [entry for entry in kept if entry["action"].startswith("free")]


def test_the_viewer_knows_every_opcode_of_the_pickle(tmp_path: Path) -> None:
    path = tmp_path / "step.pickle"
    write_trace(path, TRACE)
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())}
    assert opcodes <= VIEWER_OPCODES


def test_categories_are_the_components_and_one_of_them_is_unknown() -> None:
    entries = memory_snapshot(TRACE)["device_traces"][0]
    assert {entry["category"] for entry in entries} == {
        "weights", "activations", "gradients", "unknown",
    }  # fmt: skip


def test_an_alloc_comes_after_the_segment_that_it_made() -> None:
    entries = memory_snapshot(TRACE)["device_traces"][0]
    actions = [entry["action"] for entry in entries]
    assert actions[:4] == ["segment_alloc", "alloc", "segment_alloc", "alloc"]
    assert (entries[0]["size"], entries[1]["size"]) == (44 * MiB, 43 * MiB)
    assert entries[0]["addr"] == entries[1]["addr"]


def test_a_free_names_the_stack_and_the_phase_in_which_it_happened() -> None:
    freed = [
        e for e in memory_snapshot(TRACE)["device_traces"][0] if e["action"] == "free_completed"
    ]
    assert [entry["frames"][-1]["name"] for entry in freed] == ["backward"]
    assert freed[0]["frames"][0] == {
        "filename": "model.layers.0.mlp", "line": 0, "name": "aten.mm",
    }  # fmt: skip


def test_the_chrome_trace_counts_each_component_to_its_last_value() -> None:
    events = chrome_trace(TRACE)["traceEvents"]
    last = {e["name"]: e["args"]["bytes"] for e in events if e["ph"] == "C"}
    assert last == {
        "weights": 44 * MiB,
        "activations": MiB // 2,
        "gradients": 100 * MiB,
        "allocated": 144 * MiB + MiB // 2,
        "reserved": 166 * MiB,
    }


def test_the_chrome_trace_has_the_fields_that_the_format_requires() -> None:
    # Trace Event Format, Google: ph, pid everywhere; ts but for metadata; s on instants; dur on X.
    document = json.loads(json.dumps(chrome_trace(TRACE)))
    for item in document["traceEvents"]:
        assert {"ph", "pid", "name"} <= item.keys()
        assert item["ph"] == "M" or isinstance(item["ts"], int)
        assert item["ph"] != "i" or item["s"] in "gpt"
    slices = [(e["name"], e["ts"], e["dur"]) for e in document["traceEvents"] if e["ph"] == "X"]
    assert slices == [("load", 0, 1), ("forward", 1, 3), ("backward", 4, 3)]


@pytest.mark.parametrize("name", ["step.pickle.gz", "step.json.gz"])
def test_gz_holds_the_same_bytes_and_two_runs_are_identical(name: str, tmp_path: Path) -> None:
    compressed, plain = tmp_path / name, tmp_path / name.removesuffix(".gz")
    write_trace(compressed, TRACE)
    write_trace(plain, TRACE)
    assert gzip.decompress(compressed.read_bytes()) == plain.read_bytes()
    first = compressed.read_bytes()
    write_trace(compressed, TRACE)
    assert compressed.read_bytes() == first


@pytest.mark.parametrize("name", ["step.txt", "step", "step.gz", "pickle.csv.gz"])
def test_an_unknown_suffix_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"end it with \.pickle .* or \.json") as caught:
        write_trace(tmp_path / name, TRACE)
    assert "\n" not in str(caught.value)


def test_a_broken_trace_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not allocated"):
        write_trace(tmp_path / "step.json", [event("free", 9, 1, "weights", "load")])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_trace(tmp_path / "step.json", TRACE)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_trace_is_a_valid_file(tmp_path: Path) -> None:
    write_trace(tmp_path / "step.pickle", [])
    assert pickle.loads((tmp_path / "step.pickle").read_bytes())["segments"] == []
