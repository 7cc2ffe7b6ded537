"""The way of the data written as code: request, run, step, peak, range, verdict, result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from estimator import __version__
from estimator.calibration import (
    ALLOCATED,
    HANDLES,
    RESERVED,
    DeviceConstants,
    allocated_range,
    device_constants,
    device_used_range,
    reserved_range,
)
from estimator.catalog import Gpu
from estimator.components import COMPONENTS, Component
from estimator.eager.size import Polynomial, powers
from estimator.eager.tensor import Regime
from estimator.memory.allocator import charge
from estimator.memory.ledger import Entry, Ledger, Row, constant_row
from estimator.memory.standing import managed_bytes
from estimator.memory.timeline import Moment, Step, compile_step
from estimator.request import EstimateRequest
from estimator.resolve import check_length, resolve
from estimator.result import (
    Capacity,
    ComponentRows,
    Limits,
    MomentBytes,
    Parameters,
    Peak,
    Range,
    Result,
    ResultRow,
    RunnerUp,
    Verdict,
)
from estimator.run import Run
from estimator.sources import Assumption, Cite
from estimator.techniques.software import PROFILES
from estimator.verdict import judge

SORTED_EMBEDDING_TOKENS = 3072
FUSED_4BIT_TOKENS = 1536
_ROUNDING = Cite("torch-allocator", "round_size, get_allocation_size and should_split")


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU of a request: its constants and what it offers [bytes]."""

    capacity: Capacity
    constants: DeviceConstants


@dataclass(frozen=True, slots=True)
class Reading:
    """The peak at one micro-batch and length, before it becomes a document.

    Args:
        moment: the highest moment.
        runner_up: the highest of the moments with another name, and its bytes.
        allocated: bytes of the peak, block rounding included.
    """

    moment: Moment
    runner_up: tuple[str, int] | None
    allocated: int


class Engine:
    """The analytic engine for one model and recipe, at any micro-batch and length."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.managed = managed_bytes(run)
        self.windows = tuple(
            kind.sliding_window for kind in run.spec.kinds if kind.sliding_window is not None
        )
        # Only attention without a fused kernel tells one row from several.
        self.multiplies_scores = (
            run.settings.attention == "eager"
            or run.spec.broadcasts_keys
            or (run.autocast is None and not run.spec.embeddings[0].dtype.is_half)
        )
        self._steps: dict[Regime, Step] = {}

    def step(self, micro_batch_size: int, seq_len: int) -> Step:
        """Return the moments of the step in the regime of this micro-batch and length."""
        regime = self._regime(micro_batch_size, seq_len)
        if regime not in self._steps:
            self._steps[regime] = compile_step(self.run, regime)
        return self._steps[regime]

    def _regime(self, micro_batch_size: int, seq_len: int) -> Regime:
        tokens = micro_batch_size * seq_len
        return Regime(
            sorts_embedding_gradient=tokens > SORTED_EMBEDDING_TOKENS,
            dequantizes=tokens > FUSED_4BIT_TOKENS,
            exceeds_window=any(seq_len >= window for window in self.windows),
            several_rows=micro_batch_size > 1 or not self.multiplies_scores,
        )

    def read(self, micro_batch_size: int, seq_len: int, constants: DeviceConstants) -> Reading:
        """Return the peak at one micro-batch and length on one kind of device."""
        at = powers(micro_batch_size, seq_len)
        highest: dict[str, tuple[int, Moment]] = {}
        for moment in self.step(micro_batch_size, seq_len).moments:
            size = moment.bytes_at(at)
            if moment.name not in highest or size > highest[moment.name][0]:
                highest[moment.name] = (size, moment)
        ranked = sorted(highest.values(), key=lambda each: -each[0])
        fixed = HANDLES * constants.cublas_workspace
        top = ranked[0][1]
        allocated = rounded_bytes(top, at) + fixed
        runner_up = None
        if len(ranked) > 1:
            runner_up = (ranked[1][1].name, ranked[1][0] - ranked[0][0] + allocated)
        return Reading(top, runner_up, allocated)

    def device_used(self, allocated: int, constants: DeviceConstants) -> Range:
        """Return what the driver shows as used when this much is allocated at the peak."""
        reserved = reserved_range(allocated_range(allocated))
        return device_used_range(reserved, constants, self.managed)

    def verdict(self, micro_batch_size: int, seq_len: int, device: Device) -> Verdict:
        """Return whether one micro-batch and length fits on a device."""
        reading = self.read(micro_batch_size, seq_len, device.constants)
        used = self.device_used(reading.allocated, device.constants)
        return judge(used, device.capacity.usable_bytes)


def rounded_bytes(moment: Moment, at: Polynomial) -> int:
    """Sum the blocks that the allocator hands out for everything alive at a moment."""
    passing = sum(charge(entry_size(each, at)) * each.count for each in moment.passing.entries)
    return moment.standing.constant_charge + passing


def entry_size(entry: Entry, at: Polynomial) -> int:
    """Bytes of one of an entry's tensors."""
    coefficient, index = entry.row.size
    return coefficient * at[index]


def device_of(gpu: Gpu | None, request: EstimateRequest) -> Device:
    """Return the device that a request is judged by.

    An explicit `memory_bytes` wins over the catalogue; what others use is subtracted.
    """
    hardware = request.hardware
    constants = device_constants(gpu.compute_capability if gpu is not None else "")
    name = gpu.name if gpu is not None else hardware.gpu
    usable, source = hardware.memory_bytes, "the request's memory_bytes"
    if usable is None and gpu is not None and gpu.usable_bytes is not None:
        usable, source = gpu.usable_bytes, f"{gpu.usable_basis}: {gpu.usable_source}"
    elif usable is None:
        source = "no GPU and no memory size was given"
        if gpu is not None:
            source = f"the catalogue has no usable memory for {gpu.name}; give memory_bytes"
    if usable is not None and hardware.reserved_by_others_bytes:
        usable = max(0, usable - hardware.reserved_by_others_bytes)
        source += f", less {hardware.reserved_by_others_bytes} bytes that others use"
    return Device(Capacity(name, usable, source), constants)


def engine_for(request: EstimateRequest, config: Mapping[str, Any], name: str) -> Engine:
    """Return the engine of a request's model and recipe; the latest are kept."""
    recipe = request.model_dump_json(
        exclude={
            "model", "micro_batch_size", "seq_len", "gradient_accumulation_steps", "hardware",
            "confidence",
        }
    )  # fmt: skip
    accumulates = request.gradient_accumulation_steps > 1
    engine = _engine(_Asked(request, config, name, (name, id(config), recipe, accumulates)))
    check_length(engine.run.spec, request.seq_len)
    return engine


class _Asked:
    """A request that is equal to another when their model and recipe are."""

    __slots__ = ("config", "key", "name", "request")

    def __init__(
        self, request: EstimateRequest, config: Mapping[str, Any], name: str, key: tuple[Any, ...]
    ) -> None:
        self.request = request
        self.config = config
        self.name = name
        self.key = key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self.key == other.key


@lru_cache(maxsize=128)
def _engine(asked: _Asked) -> Engine:
    return Engine(resolve(asked.request, asked.config, asked.name))


def answer(
    request: EstimateRequest, config: Mapping[str, Any], name: str, gpu: Gpu | None
) -> Result:
    """Return the result of one request, without limits and suggestions.

    Args:
        config: the content of the model's config.json.
        name: the model's name for people.
        gpu: the catalogue's row of the requested GPU, if one was requested.
    """
    engine = engine_for(request, config, name)
    device = device_of(gpu, request)
    b, s = request.micro_batch_size, request.seq_len
    reading = engine.read(b, s, device.constants)
    used = engine.device_used(reading.allocated, device.constants)
    allocated = allocated_range(reading.allocated)
    spec = engine.run.spec
    trainable = spec.trainable_parameters()
    total = spec.total_parameters()
    return Result(
        schema="estimate/v1",
        engine="analytic",
        model=name,
        verdict=judge(used, device.capacity.usable_bytes),
        message="",
        peak=Peak(
            moment=reading.moment.name,
            runner_up=_runner_up(reading),
            allocated_bytes=allocated,
            reserved_bytes=reserved_range(allocated),
            device_used_bytes=used,
            host_bytes=Range(0, 0, 0),
        ),
        capacity=device.capacity,
        breakdown=_breakdown(reading.moment, b, s, device.constants),
        outside=_outside(engine, reading, device.constants),
        timeline=_timeline(engine.step(b, s), b, s, device.constants),
        parameters=Parameters(total=total, trainable=trainable, active=total),
        limits=Limits(None, None, None, None),
        suggestions=(),
        request=request.model_dump(mode="json"),
        assumptions=_assumptions(reading.moment, device.constants),
        notes=(*spec.notes, *_defaults(request)),
        not_modelled=(*NOT_MODELLED, *PROFILES[request.software.version].not_modelled),
        versions={"vramplan": __version__, "modelled stack": MODELLED_STACK},
    )


MODELLED_STACK = "torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2"
NOT_MODELLED = (
    "host memory",
    "evaluation, saving and merging",
    "fragmentation of the caching allocator beyond the stated spread",
)


def _runner_up(reading: Reading) -> RunnerUp | None:
    if reading.runner_up is None:
        return None
    name, size = reading.runner_up
    return RunnerUp(name, max(0, reading.allocated - size))


def _overhead(moment: Moment, at: Polynomial, constants: DeviceConstants) -> tuple[Entry, Entry]:
    """Return the library workspaces and the block rounding of a moment."""
    workspace = constants.cublas_workspace
    return (
        Entry(
            constant_row(
                "cuBLAS workspace", "workspace", "process", workspace, f"{workspace} B",
                constants.cublas_source,
            ),
            HANDLES,
        ),
        Entry(
            constant_row(
                "allocator rounding", "runtime", "process",
                rounded_bytes(moment, at) - moment.bytes_at(at),
                "blocks handed out - bytes requested", _ROUNDING,
            ),
            1,
        ),
    )  # fmt: skip


def _breakdown(
    moment: Moment, b: int, s: int, constants: DeviceConstants
) -> tuple[ComponentRows, ...]:
    """Return the rows that are alive at a moment by component, largest first."""
    at = powers(b, s)
    rows: dict[str, list[ResultRow]] = {}
    for entry in _merged(moment.alive.plus(*_overhead(moment, at, constants))):
        row, size = entry.row, entry_size(entry, at)
        if size == 0:
            continue
        rows.setdefault(row.component, []).append(
            ResultRow(
                name=row.name,
                site=row.site,
                count=entry.count,
                bytes=size * entry.count,
                formula=_with_numbers(row.formula, entry.count, b, s),
                source=str(row.source),
                basis=row.basis,
            )
        )
    return tuple(
        ComponentRows(
            component,
            sum(each.bytes for each in rows[component]),
            tuple(sorted(rows[component], key=lambda each: (-each.bytes, each.name, each.site))),
        )
        for component in COMPONENTS
        if component in rows
    )


def _merged(ledger: Ledger) -> list[Entry]:
    """Add up the entries of one row: the first, the inner and the last layers hold the same."""
    counts: dict[Row, int] = {}
    for each in ledger.entries:
        counts[each.row] = counts.get(each.row, 0) + each.count
    return [Entry(row, count) for row, count in counts.items() if count]


def _with_numbers(formula: str, count: int, b: int, s: int) -> str:
    """Put the request's numbers into a row's formula.

    Example:
        >>> _with_numbers("[b, s, h=4096] x 2 B", 32, 4, 2048)
        '32 x [b=4, s=2048, h=4096] x 2 B'
    """
    filled = formula
    for letter, value in (("b", b), ("s", s)):
        for before, after in (("[", ","), ("[", "]"), (" ", ","), (" ", "]")):
            filled = filled.replace(f"{before}{letter}{after}", f"{before}{letter}={value}{after}")
    return f"{count} x {filled}" if count != 1 else filled


def _outside(engine: Engine, reading: Reading, constants: DeviceConstants) -> tuple[ResultRow, ...]:
    """Return what lies between the allocated bytes and what the driver shows as used."""
    allocated = allocated_range(reading.allocated)
    cached = reserved_range(allocated).expected - allocated.expected
    reserved = str(RESERVED.reason)
    rows = [
        ResultRow(
            "reserved by the allocator, not allocated", "process", 1, cached,
            f"{RESERVED.expected - 1:.0%} of the allocated peak", reserved, "assumed",
        ),
        ResultRow(
            "CUDA context and loaded kernels", "process", 1, constants.context.expected,
            "constant of the architecture", str(constants.context_source), "assumed",
        ),
    ]  # fmt: skip
    if engine.managed:
        rows.append(
            ResultRow(
                "paged optimizer states", "process", 1, engine.managed,
                "CUDA managed memory", "bitsandbytes: optim/optimizer.py, get_state_buffer",
                "formula",
            )
        )  # fmt: skip
    return tuple(rows)


def _timeline(step: Step, b: int, s: int, constants: DeviceConstants) -> tuple[MomentBytes, ...]:
    """Return the highest instant of each named moment, in the order of time."""
    at = powers(b, s)
    highest: dict[str, Moment] = {}
    for moment in step.moments:
        known = highest.get(moment.name)
        if known is None or moment.bytes_at(at) > known.bytes_at(at):
            highest[moment.name] = moment
    timeline = []
    for name, moment in highest.items():
        components: dict[Component, int] = dict.fromkeys(COMPONENTS, 0)
        components.update(moment.standing.constant_components)
        for entry in (*moment.passing.entries, *_overhead(moment, at, constants)):
            components[entry.row.component] += entry_size(entry, at) * entry.count
        shown: dict[str, int] = {key: size for key, size in components.items() if size}
        timeline.append(MomentBytes(name, sum(shown.values()), shown))
    return tuple(timeline)


def _assumptions(moment: Moment, constants: DeviceConstants) -> tuple[str, ...]:
    """Return the reason behind every number that has no source."""
    reasons = [ALLOCATED.reason.reason, RESERVED.reason.reason, constants.context_source.reason]
    reasons += [
        each.row.source.reason
        for each in moment.alive.entries
        if isinstance(each.row.source, Assumption)
    ]
    return tuple(dict.fromkeys(reasons))


def _defaults(request: EstimateRequest) -> tuple[str, ...]:
    """Return one note that names every field left to its default."""
    given = request.model_fields_set
    left = [name for name in EstimateRequest.model_fields if name not in given]
    if not left:
        return ()
    values = request.model_dump(mode="json")
    shown = ", ".join(f"{name} {_short(values[name])}" for name in left if name in _TOLD)
    return (f"defaults: {shown}",) if shown else ()


_TOLD = (
    "method", "precision", "optimizer", "micro_batch_size", "seq_len", "activation_checkpointing",
    "attention", "loss", "software",
)  # fmt: skip


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(each) for each in value.values() if isinstance(each, str))
    return str(value)
