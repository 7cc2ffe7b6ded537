"""The result document of a dry run: the same document that the analytic engine gives."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from estimator import __version__
from estimator.breakdown import outside
from estimator.calibration import Work
from estimator.components import COMPONENTS, Component
from estimator.memory.allocator import charge
from estimator.memory.lengths import ALIKE
from estimator.pipeline import device_of, lengths_in
from estimator.request import EstimateRequest, InlineModel
from estimator.result import (
    ComponentRows,
    Limits,
    MomentBytes,
    Peak,
    Range,
    Result,
    ResultRow,
    RunnerUp,
)
from estimator.service import requested_gpu
from estimator.traits import traits
from estimator.verdict import judge, sentence
from profiler import trace

if TYPE_CHECKING:
    from profiler.engine import DryRun

_STACK: Final = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
_NOT_MODELLED: Final = (
    "host memory",
    "evaluation, saving and merging",
    "cuDNN attention, which newer torch prefers on Hopper and Blackwell: traced as flash attention",
)
_NO_WATERFALL: Final = "the dry run answers one recipe; ask the analytic engine for the waterfall"
_ONE_LENGTH: Final = (
    "the dry run has batches of seq_len only; what sample_lengths change is left out of it"
)
_ASSUMPTIONS: Final = (
    "every token id of a batch is different as far as the embedding's backward is concerned",
)


def _left_out(request: EstimateRequest) -> tuple[str, ...]:
    told = ((request.waterfall, _NO_WATERFALL), (bool(request.sample_lengths), _ONE_LENGTH))
    return tuple(text for asked, text in told if asked)


def result(request: EstimateRequest, run: DryRun) -> Result:
    """Return the result document of a traced run."""
    reading = trace.read(run.trace)
    device = device_of(requested_gpu(request), request)
    work = Work(request.micro_batch_size * request.seq_len, request.seq_len)
    widths = device.ranges(traits(request, run.parameters.total))
    allocated = widths.allocated.around(reading.peak.allocated_bytes, work)
    held = Range(reading.reserved_bytes, reading.reserved_bytes, reading.reserved_bytes)
    reserved = widths.of_reserved(held, allocated, work)
    used = widths.of_device_used(reserved, run.managed_bytes, work)
    # Batches of other lengths are not run, whatever is known of them.
    unknown = lengths_in(request) != ALIKE
    fresh = _fresh_blocks(run.trace, reading)
    needed = widths.of_needed(fresh, reading.pinned_bytes, work, unknown=unknown)
    verdict = judge(needed, device.capacity.usable_bytes)
    peak = Peak(
        moment=reading.peak.phase,
        runner_up=_runner_up(reading),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        device_used_bytes=used,
        needed_bytes=needed,
        host_bytes=Range(0, 0, 0),
    )
    return Result(
        schema="estimate/v1",
        engine="dry-run",
        model=model_name(request),
        verdict=verdict,
        message=sentence(verdict, peak, device.capacity, (), request.confidence),
        peak=peak,
        capacity=device.capacity,
        breakdown=_breakdown(run.trace, reading.peak),
        timeline=tuple(_moment(run.trace, point) for point in reading.points),
        parameters=run.parameters,
        limits=Limits(None, None, None, None),
        suggestions=(),
        request=request.to_dict(),
        outside=outside(allocated, reserved, device.constants, run.managed_bytes),
        promises=widths.promises(work),
        assumptions=(*widths.reasons(work, unknown=unknown), *_ASSUMPTIONS),
        notes=(*run.notes, *_left_out(request)),
        not_modelled=_NOT_MODELLED,
        versions=versions(),
    )


def _fresh_blocks(traced: trace.Trace, reading: trace.Reading) -> int:
    """Sum the blocks that the tensors of the peak would get from fresh segments [bytes]."""
    point = max(reading.points, key=lambda point: point.requested_bytes)
    return sum(charge(storage.bytes) for storage in trace.live_storages(traced, point.event))


def versions() -> dict[str, str]:
    """Return the versions of the libraries whose code was run."""
    found = {"vramplan": __version__}
    for name in _STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_name(request: EstimateRequest) -> str:
    """Return what the model is called for people."""
    if isinstance(request.model, InlineModel):
        return str(request.model.config.get("_name_or_path") or "inline configuration")
    return request.model


def _runner_up(reading: trace.Reading) -> RunnerUp | None:
    others = [point for point in reading.points if point is not reading.peak]
    if not others:
        return None
    second = max(others, key=lambda point: point.allocated_bytes)
    return RunnerUp(second.phase, reading.peak.allocated_bytes - second.allocated_bytes)


def _moment(traced: trace.Trace, point: trace.Point) -> MomentBytes:
    components = trace.component_bytes(traced, point.event)
    components["runtime"] += point.allocated_bytes - point.requested_bytes
    shown: dict[str, int] = {name: size for name, size in components.items() if size}
    return MomentBytes(point.phase, point.allocated_bytes, shown)


def _breakdown(traced: trace.Trace, point: trace.Point) -> tuple[ComponentRows, ...]:
    source = "dry run of " + ", ".join(
        f"{name} {number}" for name, number in versions().items() if name in _STACK
    )
    rows: dict[Component, list[ResultRow]] = {}
    for row in trace.rows(traced, point.event):
        rows.setdefault(row.component, []).append(
            ResultRow(
                name=f"{row.module} {row.operator} {row.dtype}".strip(),
                site=row.site,
                count=row.count,
                bytes=row.bytes,
                formula=f"{row.count} x {list(row.shape)} {row.dtype}",
                source=source,
                basis="measured",
            )
        )
    rows.setdefault("runtime", []).append(
        ResultRow(
            name="allocator rounding",
            site="process",
            count=1,
            bytes=point.allocated_bytes - point.requested_bytes,
            formula="blocks handed out - bytes requested",
            source="torch-allocator: round_size, get_allocation_size and should_split",
            basis="formula",
        )
    )
    return tuple(
        ComponentRows(name, sum(row.bytes for row in rows[name]), tuple(rows[name]))
        for name in COMPONENTS
        if name in rows
    )
