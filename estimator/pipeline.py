"""The way of the data written as code: request, run, step, peak, range, verdict, result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from math import inf
from typing import Any, Final

from msgspec import Struct, structs

from estimator import __version__
from estimator.breakdown import Highest, View, assumptions, outside
from estimator.calibration import (
    COMPILED_REASON,
    HANDLES,
    RECORDED,
    DeviceConstants,
    Ranges,
    Work,
    compiled_range,
    device_constants,
    ranges,
)
from estimator.calibration_file import Traits
from estimator.catalog import Gpu
from estimator.eager.float8 import MULTIPLE
from estimator.eager.size import Polynomial, powers
from estimator.eager.tensor import Regime
from estimator.memory.average import average_host_bytes
from estimator.memory.caching_allocator import DEFAULT_SETTINGS, AllocatorSettings
from estimator.memory.hessian_pass import hessian_pass
from estimator.memory.lengths import (
    ADAPTER_SHARE,
    ALIKE,
    FIRST,
    FIRST_BATCH,
    ORDERS,
    Lengths,
    lengths_of,
    orders,
    reason,
)
from estimator.memory.loading import loading_assumptions, loading_moment
from estimator.memory.loss import LOSSES, MeasuredLoss
from estimator.memory.recordings import Recordings
from estimator.memory.replay import Blocks, Conditions, Turn, blocks
from estimator.memory.requests import Request, requests
from estimator.memory.standing import managed_bytes, trained_tensors
from estimator.memory.timeline import Moment, Step, compile_step
from estimator.memory.trace import Trace, trace
from estimator.model.spec import Embedding, Linear
from estimator.request import EstimateRequest
from estimator.resolve import check_gpu, check_length, check_tokens, resolve
from estimator.result import Capacity, Limits, Parameters, Peak, Range, Result, Verdict
from estimator.run import Run
from estimator.techniques.kernels import COMPILATIONS
from estimator.techniques.optimizers import Trained, cpu_offload
from estimator.techniques.software import profile
from estimator.traits import software_of, traits
from estimator.verdict import judge

Traces = dict[Regime, Trace]

KEPT_REPLAYS = 64
SORTED_EMBEDDING_TOKENS = 3072
FUSED_4BIT_TOKENS = 1536


class Device(Struct, frozen=True):
    """The GPU of a request, what it offers [bytes], and how sure the verdict has to be.

    Args:
        key: the catalogue's id; None where the card is not in it.
    """

    capacity: Capacity
    constants: DeviceConstants
    key: str | None
    compute_capability: str
    confidence: float

    def ranges(self, recipe: Traits) -> Ranges:
        """Return how wide the ranges of a recipe are on this device."""
        return ranges(recipe, self.key, self.compute_capability, self.confidence)


class Reading(Struct, frozen=True):
    """The peak at one micro-batch and length, read off the polynomials.

    Args:
        moment: the highest moment.
        allocated: its bytes in whole blocks, each of the size that a fresh segment would give.
        eager: what the same run needs uncompiled, in blocks; None where nothing is compiled.
        unpooled: what may come on top because CUDA graphs keep their pool to themselves.
    """

    moment: Moment
    allocated: int
    eager: int | None = None
    unpooled: int = 0

    def share(self, replay: Blocks) -> float:
        """Return what the allocator cannot give back, as a multiple of the allocated peak."""
        return max(1.0, replay.pinned / self.allocated)

    def needed(
        self, widths: Ranges, work: Work, share: float = 1.0, *, unknown: bool = False
    ) -> Range:
        """Return the least device memory with which the run does not run out, without a replay.

        Args:
            share: what the allocator cannot give back, as a multiple of the allocated peak.
            unknown: whether the lengths of batches are not known.
        """

        def needed(allocated: int) -> Range:
            pinned = round(allocated * share)
            return widths.of_needed(allocated, pinned, work, unknown=unknown)

        if self.eager is None:
            return needed(self.allocated)
        found = compiled_range(needed(self.allocated), needed(self.eager))
        return Range(found.low, found.expected, found.high + self.unpooled)


class Engine:
    """The analytic engine for one model and recipe, at any micro-batch and length.

    Args:
        traces: what was traced of this recipe, whatever the optimizer; new ones are added.
        recipe: what its ranges depend on.
    """

    def __init__(self, run: Run, traces: Traces, recipe: Traits) -> None:
        self.run = run
        self.recipe = recipe
        self.managed = managed_bytes(run)
        # Backward multiplies in a thread of its own.
        self.handles = 1 if run.forward_only else HANDLES
        windows = (kind.sliding_window for kind in run.spec.kinds)
        self.window: float = min((each for each in windows if each is not None), default=inf)
        # Only attention without a fused kernel tells one row from several.
        self.multiplies_scores = (
            run.settings.attention == "eager"
            or run.settings.kernel == "math"
            or run.spec.broadcasts_keys
            or run.kept_logits > 0
            or isinstance(LOSSES[run.loss], MeasuredLoss)
            or (run.autocast is None and not run.spec.embeddings[0].dtype.is_half)
        )
        self.trains_embeddings = any(
            weight.trainable
            for module in run.spec.embeddings
            if isinstance(module, Embedding)
            for weight in module.weights()
        )
        # Tokens from which on packed weights are dequantized as a whole.
        self.packed_tokens = next(
            (
                getattr(module.format, "dense_tokens", FUSED_4BIT_TOKENS)
                for module, _ in run.spec.module_counts()
                if isinstance(module, Linear) and module.format is not None
            ),
            None,
        )
        spec = run.spec
        adapts = spec.trainable_parameters() <= ADAPTER_SHARE * spec.total_parameters()
        self._first_batches = 1 if adapts else FIRST
        self._loss_rows = LOSSES[run.loss].rows
        self._traces = traces
        self._steps: dict[Regime, Step] = {}
        # The same run uncompiled, which dynamo may fall back to.
        self.eager: Engine | None = None
        self._recordings = Recordings(run)
        self._replays = lru_cache(maxsize=KEPT_REPLAYS)(self._replay)
        self._orders = lru_cache(maxsize=KEPT_REPLAYS)(self._replay_orders)

    @cached_property
    def trained(self) -> tuple[Trained, ...]:
        """Every tensor that the optimizer is given."""
        return trained_tensors(self.run)

    def step(self, micro_batch_size: int, seq_len: int) -> Step:
        """Return the moments of the step in the regime of this micro-batch and length."""
        return self._step(self._regime_of(self.numbers(micro_batch_size, seq_len)))

    def _step(self, regime: Regime) -> Step:
        step = self._steps.get(regime)
        if step is None:
            second = hessian_pass(self.run)
            step = self._steps[regime] = compile_step(
                self.run,
                self._trace(regime),
                trace(second, regime) if second is not None else None,
            )
        return step

    @cached_property
    def loading(self) -> Moment | None:
        """The highest moment of loading, where it needs more than what stays."""
        return loading_moment(self.run)

    def moments(self, micro_batch_size: int, seq_len: int, at: Polynomial) -> tuple[Moment, ...]:
        """Return the highest instant of each named moment, in the order of time."""
        before = () if self.loading is None else (self.loading,)
        return (*before, *self.step(micro_batch_size, seq_len).highest(at))

    def _trace(self, regime: Regime) -> Trace:
        if regime not in self._traces:
            self._traces[regime] = trace(self.run, regime)
        return self._traces[regime]

    def _regime_of(self, numbers: tuple[int, int, int]) -> Regime:
        """Return the switches; one that this run has no use for stays where it is."""
        rows, seq_len, second = numbers
        tokens = rows * seq_len
        looked_up = tokens if self.trains_embeddings else rows * self.run.prefix_tokens
        return Regime(
            sorts_embedding_gradient=looked_up > SORTED_EMBEDDING_TOKENS,
            dequantizes=self.packed_tokens is not None and tokens > self.packed_tokens,
            exceeds_window=max(seq_len, second) >= self.window,
            several_rows=rows > 1 or not self.multiplies_scores,
            loss_rows=self._loss_rows(self.run.spec, tokens),
            aligned_tokens=not self.run.pads_tokens or tokens % MULTIPLE == 0,
        )

    def numbers(self, micro_batch_size: int, seq_len: int) -> tuple[int, int, int]:
        """Return the rows that the model sees, their length and the second length."""
        rows, tokens = self.run.batch(micro_batch_size, seq_len)
        return (rows, *self.run.lengths(tokens))

    def read(self, micro_batch_size: int, seq_len: int, constants: DeviceConstants) -> Reading:
        """Return the peak at one micro-batch and length on one kind of device."""
        numbers = self.numbers(micro_batch_size, seq_len)
        at = powers(*numbers)
        top = self._step(self._regime_of(numbers)).top(at)
        allocated = top.blocks_at(at) + self.handles * constants.cublas_workspace
        if self.loading is not None and self.loading.standing.constant_charge > allocated:
            top, allocated = self.loading, self.loading.standing.constant_charge
        if self.eager is None:
            return Reading(top, allocated)
        eager = self.eager.read(micro_batch_size, seq_len, constants).allocated
        return Reading(top, allocated, eager, self._unpooled(micro_batch_size, seq_len))

    def least_bytes(self, micro_batch_size: int, seq_len: int) -> int:
        """Return what the tensors of the step take at once: no device does with less."""
        numbers = self.numbers(micro_batch_size, seq_len)
        at = powers(*numbers)
        return self._step(self._regime_of(numbers)).top(at).bytes_at(at)

    def _unpooled(self, micro_batch_size: int, seq_len: int) -> int:
        """Bytes of the moments behind backward that a pool of CUDA graphs cannot serve."""
        if not self.run.settings.cuda_graphs:
            return 0
        at = powers(*self.numbers(micro_batch_size, seq_len))
        after = [each.bytes_at(at) for each in self.step(micro_batch_size, seq_len).moments]
        names = [each.name for each in self.step(micro_batch_size, seq_len).moments]
        end = names.index("end of backward")
        return max(after[end:]) - after[end]

    def verdict(
        self, micro_batch_size: int, seq_len: int, device: Device, lengths: Lengths = ALIKE
    ) -> Verdict:
        """Return whether one micro-batch and length fits on a device."""
        needed = self.needed(micro_batch_size, seq_len, device, lengths)
        return judge(needed, device.capacity.usable_bytes)

    def rough_verdict(
        self,
        micro_batch_size: int,
        seq_len: int,
        device: Device,
        share: float,
        *,
        unknown: bool = False,
    ) -> Verdict:
        """Return the same without a replay, from what the allocator cannot give back elsewhere."""
        reading = self.read(micro_batch_size, seq_len, device.constants)
        work = Work(micro_batch_size * seq_len, seq_len)
        needed = reading.needed(device.ranges(self.recipe), work, share, unknown=unknown)
        return judge(needed, device.capacity.usable_bytes)

    def share(
        self, micro_batch_size: int, seq_len: int, device: Device, lengths: Lengths = ALIKE
    ) -> float:
        """Return what the allocator cannot give back, as a multiple of the allocated peak."""
        reading = self.read(micro_batch_size, seq_len, device.constants)
        replays = self._replayed(micro_batch_size, seq_len, device, lengths)
        return max(reading.share(each) for each in replays)

    def refused_share(
        self, micro_batch_size: int, seq_len: int, device: Device, lengths: Lengths = ALIKE
    ) -> float | None:
        """Return None where it fits, else what the allocator cannot give back, as `share` does.

        One replay with which it does not fit is enough; the one that is likely to need most is
        made first.
        """
        at = (micro_batch_size, seq_len)
        if self.eager is not None or lengths.samples:
            fits = self.verdict(*at, device, lengths) == "fits"
            return None if fits else self.share(*at, device, lengths)
        reading = self.read(*at, device.constants)
        for first in (self._first_batch(seq_len), None) if lengths.unknown else (None,):
            found = self._replays(*at, device.constants.cublas_workspace, None, first)
            share = reading.share(found)
            if self.rough_verdict(*at, device, share, unknown=lengths.unknown) != "fits":
                return share
        return None

    def needed(
        self, micro_batch_size: int, seq_len: int, device: Device, lengths: Lengths = ALIKE
    ) -> Range:
        """Return the least device memory with which one micro-batch and length does not run out.

        Batches of one length need what is expected, those of others as much as the high end.
        """
        reading = self.read(micro_batch_size, seq_len, device.constants)
        widths, work = device.ranges(self.recipe), Work(micro_batch_size * seq_len, seq_len)
        replays = self._replayed(micro_batch_size, seq_len, device, lengths)
        found = widths.of_needed(
            reading.allocated,
            replays[0].pinned,
            work,
            max(each.pinned for each in replays),
            unknown=lengths.unknown,
        )
        if self.eager is None:
            return found
        eager = self.eager.needed(micro_batch_size, seq_len, device, lengths)
        found = compiled_range(found, eager)
        return Range(found.low, found.expected, found.high + reading.unpooled)

    def _replayed(
        self, micro_batch_size: int, seq_len: int, device: Device, lengths: Lengths
    ) -> tuple[Blocks, ...]:
        """Replay a run of batches of one length, and of others where they differ, with room.

        What cannot be given back is the same on a card that it just fills.
        """
        at, workspace = (micro_batch_size, seq_len), device.constants.cublas_workspace
        alike = self._replays(*at, workspace, None, None)
        if lengths.unknown:
            return alike, self._replays(*at, workspace, None, self._first_batch(seq_len))
        if not lengths.samples:
            return (alike,)
        return alike, *self._orders(*at, workspace, None, lengths.samples)

    @staticmethod
    def _first_batch(seq_len: int) -> int:
        """Return the length of the first batch where lengths are not known [tokens]."""
        return max(1, round(FIRST_BATCH * seq_len))

    def blocks(self, micro_batch_size: int, seq_len: int, device: Device) -> Blocks:
        """Replay the run through the caching allocator; the latest replays are kept."""
        workspace, capacity = device.constants.cublas_workspace, _left_to_tensors(device)
        return self._replays(micro_batch_size, seq_len, workspace, capacity, None)

    def _replay(
        self,
        micro_batch_size: int,
        seq_len: int,
        workspace: int,
        capacity: int | None,
        first: int | None,
    ) -> Blocks:
        """Replay the run.

        Args:
            first: length of the first batch [tokens]; None where all are of one length.
        """
        turn = self._turn(micro_batch_size, seq_len)
        conditions = Conditions()
        if first is not None:
            # What a shorter batch does otherwise is not traced for it alone.
            at = powers(*self.numbers(micro_batch_size, first))
            conditions = Conditions(earlier=(turn._replace(at=at),))
        free = None
        if capacity is not None:
            free = self._replays(micro_batch_size, seq_len, workspace, None, first)
        return blocks(self._recordings, turn, workspace, capacity, conditions, unbounded=free)

    def _turn(self, micro_batch_size: int, seq_len: int) -> Turn:
        numbers = self.numbers(micro_batch_size, seq_len)
        return Turn(self._regime_of(numbers), powers(*numbers))

    def blocks_under(
        self,
        micro_batch_size: int,
        seq_len: int,
        device: Device,
        *,
        settings: AllocatorSettings = DEFAULT_SETTINGS,
        earlier: tuple[int, ...] = (),
    ) -> Blocks:
        """Replay the run under conditions that no request names.

        Args:
            settings: of the allocator.
            earlier: lengths of the steps before.
        """
        turns = tuple(self._turn(micro_batch_size, each) for each in earlier)
        turn = self._turn(micro_batch_size, seq_len)
        workspace, capacity = device.constants.cublas_workspace, _left_to_tensors(device)
        conditions = Conditions(settings, turns)
        return blocks(self._recordings, turn, workspace, capacity, conditions)

    def reserved_range(
        self,
        micro_batch_size: int,
        seq_len: int,
        device: Device,
        lengths: Lengths = ALIKE,
    ) -> Range:
        """Return what the allocator holds at most: the least, the middle and the most of orders."""
        at, workspace = (micro_batch_size, seq_len), device.constants.cublas_workspace
        if lengths.samples:
            replays = self._orders(*at, workspace, _left_to_tensors(device), lengths.samples)
        else:
            replays = (self.blocks(*at, device),)
        held = sorted(each.reserved for each in replays)
        return Range(held[0], held[len(held) // 2], held[-1])

    def _replay_orders(
        self,
        micro_batch_size: int,
        seq_len: int,
        workspace: int,
        capacity: int | None,
        sample_lengths: tuple[int, ...],
    ) -> tuple[Blocks, ...]:
        """Replay some random orders of the samples."""
        free: tuple[Blocks | None, ...] = (None,) * ORDERS
        if capacity is not None:
            free = self._orders(micro_batch_size, seq_len, workspace, None, sample_lengths)
        found = []
        drawn = orders(sample_lengths, micro_batch_size, seq_len, self._first_batches)
        for order, unbounded in zip(drawn, free, strict=True):
            *earlier, last = (self._turn(micro_batch_size, each) for each in order)
            conditions = Conditions(earlier=tuple(earlier))
            found.append(
                blocks(self._recordings, last, workspace, capacity, conditions, unbounded=unbounded)
            )
        return tuple(found)

    def requests(self, micro_batch_size: int, seq_len: int, device: Device) -> Iterator[Request]:
        """Yield every request for memory until the end of the second step."""
        numbers = self.numbers(micro_batch_size, seq_len)
        workspaces = self.handles * device.constants.cublas_workspace
        return requests(self.run, self._regime_of(numbers), powers(*numbers), workspaces)


def _left_to_tensors(device: Device) -> int | None:
    """Return what a card leaves to the allocator beside the CUDA context [bytes]."""
    usable = device.capacity.usable_bytes
    if usable is None:
        return None
    left = usable - device.constants.context.expected
    return left if left > 0 else None


def device_of(gpu: Gpu | None, request: EstimateRequest) -> Device:
    """Return the device that a request is judged by.

    An explicit `memory_bytes` wins over the catalogue; what others use is subtracted.
    """
    hardware = request.hardware
    key, capability = (gpu.key, gpu.compute_capability) if gpu is not None else (None, "")
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
    return Device(
        capacity=Capacity(name, usable, source),
        constants=device_constants(capability, key, software_of(request)),
        key=key,
        compute_capability=capability,
        confidence=request.confidence,
    )


def lengths_in(request: EstimateRequest) -> Lengths:
    """Return what a request says of the lengths of its batches."""
    return lengths_of(request.sample_lengths, request.seq_len, packing=request.packing)


# The fields that an engine is made for; it answers every micro-batch and length of theirs.
_RECIPE: Final = tuple(
    field
    for field in EstimateRequest.__struct_fields__
    if field
    not in (
        "model",
        "micro_batch_size",
        "seq_len",
        "sample_lengths",
        "hardware",
        "confidence",
        "optimizer",
        "waterfall",
    )
)


def engine_for(request: EstimateRequest, config: Mapping[str, Any], name: str) -> Engine:
    """Return the engine of a request's model and recipe; the latest are kept."""
    # Of the hardware, resolving looks at the number of cards alone.
    recipe = (*(getattr(request, field) for field in _RECIPE), request.hardware.num_gpus)
    key = (name, id(config), recipe, request.optimizer)
    engine = _engine(_Asked(request, config, name, key))
    check_length(engine.run, request.seq_len)
    check_tokens(engine.run, request.micro_batch_size * request.seq_len)
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
    run = resolve(asked.request, asked.config, asked.name)
    # An optimizer in backward is a part of what is traced.
    key = asked.key if run.optimizer.in_backward else asked.key[:-1]
    recipe = traits(asked.request, run.spec.total_parameters())
    engine = Engine(run, _traces(_Asked(asked.request, asked.config, asked.name, key)), recipe)
    if run.settings.compiled:
        engine.eager = engine_for(_uncompiled(asked.request), asked.config, asked.name)
    return engine


def _uncompiled(request: EstimateRequest) -> EstimateRequest:
    """Return the same request for the eager step."""
    kernels = tuple(each for each in request.kernels if each not in COMPILATIONS)
    return structs.replace(request, kernels=kernels)


@lru_cache(maxsize=128)
def _traces(asked: _Asked) -> Traces:
    """Return the traces that the optimizers of one recipe share; the step comes after them all."""
    return {}


def answer(
    request: EstimateRequest, config: Mapping[str, Any], name: str, gpu: Gpu | None
) -> Result:
    """Return the result of one request, without limits and suggestions.

    Args:
        config: the content of the model's config.json.
        name: the model's name for people.
        gpu: the catalogue's row of the requested GPU, if one was requested.
    """
    check_gpu(request, gpu)
    engine = engine_for(request, config, name)
    device = device_of(gpu, request)
    b, s = request.micro_batch_size, request.seq_len
    numbers = engine.numbers(b, s)
    at = powers(*numbers)
    work, widths = Work(b * s, s), device.ranges(engine.recipe)
    lengths = lengths_in(request)
    needed = engine.needed(b, s, device, lengths)
    replayed = engine.blocks(b, s, device)
    highest = tuple(
        Highest(moment, replayed.rounding.get(moment.name, 0))
        for moment in engine.moments(b, s, at)
    )
    view = View(at, numbers, device.constants, engine.handles)
    peak = max(highest, key=view.allocated)
    allocated = widths.allocated.around(view.allocated(peak), work)
    held = engine.reserved_range(b, s, device, lengths)
    reserved = widths.of_reserved(held, allocated, work)
    promised = widths.reasons(work, unknown=lengths.unknown)
    reasons = (*promised, *assumptions(peak.moment), *loading_assumptions(engine.run))
    if lengths.samples:
        reasons = (reason(held.low, held.high), *reasons)
    eager = None
    if engine.eager is not None:
        eager = answer(_uncompiled(request), config, name, gpu).peak
        allocated = compiled_range(allocated, eager.allocated_bytes)
        reserved = compiled_range(reserved, eager.reserved_bytes)
        reasons = (COMPILED_REASON.reason, *reasons)
        if engine.run.settings.cuda_graphs:
            unpooled = engine.read(b, s, device.constants).unpooled
            reserved = Range(reserved.low, reserved.expected, reserved.high + unpooled)
            reasons = (RECORDED.reason, *reasons)
    host = engine.step(b, s).pinned_bytes(at) + average_host_bytes(engine.run)
    trained = engine.trained
    host += cpu_offload.host_bytes(engine.run, trained)
    late = cpu_offload.late_bytes(engine.run, trained)
    reserved = Range(reserved.low, reserved.expected, reserved.high + late)
    used = widths.of_device_used(reserved, engine.managed, work)
    if eager is not None:
        used = compiled_range(used, eager.device_used_bytes)
    spec = engine.run.spec
    total = spec.total_parameters()
    software = profile(request.software.framework, request.software.version)
    return Result(
        schema="estimate/v1",
        engine="analytic",
        model=name,
        verdict=judge(needed, device.capacity.usable_bytes),
        message="",
        peak=Peak(
            moment=peak.moment.name,
            runner_up=view.runner_up(highest, peak),
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            device_used_bytes=used,
            needed_bytes=needed,
            host_bytes=Range(host, host, host),
        ),
        capacity=device.capacity,
        breakdown=view.breakdown(peak),
        outside=outside(allocated, reserved, device.constants, engine.managed),
        timeline=view.timeline(highest),
        parameters=Parameters(total=total, trainable=spec.trainable_parameters(), active=total),
        limits=Limits(None, None, None, None),
        suggestions=(),
        request=request.to_dict(),
        promises=widths.promises(work),
        assumptions=tuple(dict.fromkeys(reasons)),
        notes=(*spec.notes, *_defaults(request)),
        not_modelled=(*NOT_MODELLED, *software.not_modelled),
        versions={"vramplan": __version__, "modelled stack": MODELLED_STACK},
    )


MODELLED_STACK = "torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2"
NOT_MODELLED = (
    "host memory, but for what is moved there: activations, an averaged model, torchao's optimizer",
    "evaluation, saving and merging",
)


def _defaults(request: EstimateRequest) -> tuple[str, ...]:
    """Return one note that names every field that has its default value."""
    values, default = request.to_dict(), _DEFAULT
    same = [name for name in _TOLD if values[name] == default[name]]
    shown = ", ".join(f"{name} {_short(values[name])}" for name in same)
    return (f"defaults: {shown}",) if shown else ()


_DEFAULT: Final = EstimateRequest(model="").to_dict()


_TOLD = (
    "method", "precision", "optimizer", "micro_batch_size", "seq_len", "activation_checkpointing",
    "attention", "loss", "software",
)  # fmt: skip


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(each) for each in value.values() if isinstance(each, str))
    return str(value)
