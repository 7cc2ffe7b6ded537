"""A memory snapshot of PyTorch, which somebody else made, read as a recording.

`torch.cuda.memory._dump_snapshot` writes the segments and blocks at the moment of the dump and the
events before it. The file is a pickle: nothing but containers, numbers and text is unpickled, and
no name of a module or a class is ever looked up.

Source: torch-caching-allocator, TraceEntry and SnapshotInfo; `torch/csrc/cuda/Module.cpp`,
THCPModule_memorySnapshot, at torch 2.13.0 has the keys of the dictionaries. Before torch 2.2 blocks
had no addresses and snapshots no settings.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from estimator.errors import EstimatorError, MalformedDocumentError
from estimator.memory.caching_allocator import (
    LARGE_SEGMENT_BYTES,
    MAX_NON_SPLIT_ROUNDING_BYTES,
    POWER2_INTERVALS,
    AllocatorSettings,
    BlockState,
)
from estimator.units import GiB
from profiler.history import KINDS, History
from profiler.recording import (
    CannotReplayError,
    Held,
    Record,
    State,
    Taken,
    history_of,
    pages,
)

MAX_SNAPSHOT_BYTES: Final = 4 * GiB
DEFAULT_POOL: Final = (0, 0)
_STATES: Final[dict[str, BlockState]] = {
    "active_allocated": "active_allocated",
    "active_awaiting_free": "active_awaiting_free",
    "active_pending_free": "active_awaiting_free",
    "inactive": "inactive",
}
# What the recording says of itself and of the program, not of the memory.
_REMARKS: Final = frozenset({"snapshot", "user_defined", "annotation"})


class _Unpickler(pickle.Unpickler):
    """Reads containers, numbers and text only."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not looked up")


def load(path: Path) -> Mapping[str, Any]:
    """Read a snapshot, packed with gzip or not.

    Raises:
        MalformedDocumentError: the file cannot be read, or holds no snapshot.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            data = file.read(MAX_SNAPSHOT_BYTES + 1)
    except OSError as error:
        raise MalformedDocumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except EOFError as error:
        raise MalformedDocumentError(f"{path} is cut off; copy it again") from error
    if len(data) > MAX_SNAPSHOT_BYTES:
        raise MalformedDocumentError(
            f"{path} is larger than {MAX_SNAPSHOT_BYTES // GiB} GiB; record fewer events"
        )
    try:
        snapshot = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # what a broken pickle raises is not bounded
        raise MalformedDocumentError(
            f"{path} is no memory snapshot: {_reason(error)}; write one with "
            "torch.cuda.memory._dump_snapshot"
        ) from error
    if not isinstance(snapshot, dict) or not isinstance(snapshot.get("device_traces"), list):
        raise MalformedDocumentError(
            f"{path} is no memory snapshot: it has no device_traces; write one with "
            "torch.cuda.memory._dump_snapshot"
        )
    return snapshot


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def devices(snapshot: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the devices that events were recorded of, those with most events first."""
    traces = snapshot["device_traces"]
    recorded = [number for number, trace in enumerate(traces) if _allocations(trace)]
    return tuple(sorted(recorded, key=lambda number: -len(traces[number])))


def _allocations(trace: Any) -> bool:
    if not isinstance(trace, list):
        return False
    return any(isinstance(each, dict) and each.get("action") in KINDS for each in trace)


def history(snapshot: Mapping[str, Any], device: int) -> History:
    """Return what happened on one device.

    Raises:
        CannotReplayError: the recording does not hold what an exact replay needs.
        MalformedDocumentError: it is not made as PyTorch makes it.
    """
    if device not in devices(snapshot):
        known = ", ".join(map(str, devices(snapshot))) or "none"
        raise CannotReplayError(
            f"no events of device {device} are recorded; devices with events: {known}. Call "
            "torch.cuda.memory._record_memory_history() before the run"
        )
    try:
        return _history(snapshot, device)
    except EstimatorError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MalformedDocumentError(
            f"the snapshot is not made as PyTorch makes it: {type(error).__name__}: {error}"
        ) from error


def _history(snapshot: Mapping[str, Any], device: int) -> History:
    records = tuple(_records(snapshot["device_traces"][device]))
    dumped = [each for each in snapshot["segments"] if each["device"] == device]
    expandable = any(each.get("is_expandable") for each in dumped) or any(
        each.kind == "segment_map" for each in records
    )
    settings = _settings(snapshot.get("allocator_settings") or {}, expandable)
    _refuse_pools(dumped)
    return history_of(_dumped_state(dumped), records, settings)


def _records(trace: Iterable[Any]) -> Iterator[Record]:
    for each in trace:
        kind = each["action"]
        if kind in _REMARKS:
            continue
        if kind not in KINDS:
            raise CannotReplayError(f"the recording has events of a kind not known here: {kind!r}")
        address = 0 if kind == "oom" else each["addr"]
        record = Record(kind, address, each["size"], each["stream"])
        if any(type(number) is not int or number < 0 for number in record[1:]):
            raise ValueError(f"event {kind} with {record[1:]}")
        yield record


def _settings(said: Mapping[str, Any], expandable: bool) -> AllocatorSettings:
    """Return the settings that the snapshot holds; those of old versions hold none."""
    if said.get("garbage_collection_threshold"):
        raise CannotReplayError(
            "garbage_collection_threshold was set, whose choices depend on ages that are not "
            "recorded; record again without it"
        )
    split = said.get("max_split_size", -1)
    return AllocatorSettings(
        expandable_segments=expandable,
        max_split_size_bytes=None if split < 0 or split >= 1 << 62 else split,
        max_non_split_rounding_bytes=said.get(
            "max_non_split_rounding_size", MAX_NON_SPLIT_ROUNDING_BYTES
        ),
        roundup_power2_divisions=_divisions(said.get("roundup_power2_divisions") or {}),
        large_segment_bytes=said.get("large_segment_size", LARGE_SEGMENT_BYTES),
    )


def _divisions(by_mib: Mapping[str, int]) -> int | tuple[int, ...]:
    divisions = tuple(by_mib[each] for each in sorted(by_mib, key=int))
    if not any(divisions):
        return 0
    if len(divisions) != POWER2_INTERVALS:
        raise CannotReplayError(f"roundup_power2_divisions has {len(divisions)} steps")
    return divisions


def _refuse_pools(dumped: Iterable[Mapping[str, Any]]) -> None:
    pools = {tuple(each.get("segment_pool_id", DEFAULT_POOL)) for each in dumped}
    if pools - {DEFAULT_POOL}:
        raise CannotReplayError(
            "segments belong to private pools, those of CUDA graphs, which events do not name; "
            "record a run without graphs"
        )


def _dumped_state(dumped: Iterable[Mapping[str, Any]]) -> State:
    """Return what the dump says: the state at the end."""
    state = State({}, {}, {}, {})
    for segment in dumped:
        begin, size = segment["address"], segment["total_size"]
        stream, is_small = segment["stream"], segment["segment_type"] == "small"
        if segment.get("is_expandable"):
            state.pages.update(dict.fromkeys(pages(begin, size), stream))
            state.small.update(dict.fromkeys(pages(begin, size), is_small))
        else:
            state.segments[begin] = Held(size, stream, is_small)
        for address, block in _blocks(segment):
            status = _STATES[block["state"]]
            if status != "inactive":
                asked = block.get("requested_size", block["size"])
                state.blocks[address] = Taken(asked, block["size"], status)
    return state


def _blocks(segment: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the blocks with their addresses, which old versions leave out."""
    address = segment["address"]
    for block in segment["blocks"]:
        address = block.get("address", address)
        yield address, block
        address += block["size"]
