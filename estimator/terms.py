"""The terms that a measurement may be explained with, each of the size that the engine gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.errors import EstimatorError
from estimator.hypotheses import Change, Plausibility, changed, changes, document_of
from estimator.measurement import CardMeter, Reading
from estimator.memory.caching_allocator import AllocatorSettings
from estimator.memory.standing import step_temporaries
from estimator.model.spec import Module
from estimator.pipeline import Device, Engine, device_of, engine_for
from estimator.planner import Question
from estimator.request import MAX_MICRO_BATCH_SIZE, MAX_SEQ_LEN, EstimateRequest
from estimator.result import Peak, Range, Result
from estimator.units import GB, GiB, gib


class Term(Struct, frozen=True):
    """One thing that may differ, and what it alone would do to the number.

    Args:
        change: the part of the request that it sets; empty where it is not about the recipe.
        difference_bytes: what the meter would read more, or less.
        fitted: a number in it was chosen so that it explains.
    """

    name: str
    summary: str
    change: dict[str, Any]
    difference_bytes: int
    plausibility: Plausibility
    fitted: bool = False


class Tried(Struct, frozen=True):
    """A term, and the change of the request behind it, if there is one."""

    term: Term
    change: Change | None


# An estimate cannot tell apart what differs by less of the reading.
NOISE: Final = 0.002
NOISE_HELD: Final = 0.02


class Case:
    """One measurement beside one estimate."""

    def __init__(self, question: Question, base: Result, reading: Reading) -> None:
        self.question = question
        self.reading = reading
        self.base = base
        self.device: Device = device_of(question.gpu, question.request)
        self.predicted = at_meter(base.peak, reading.meter)
        self.measured = reading.bytes.expected
        self.gap = self.measured - self.predicted.expected
        half = (reading.bytes.high - reading.bytes.low) // 2
        share = NOISE if reading.meter == "allocated" else NOISE_HELD
        self.noise = max(half, round(share * self.measured), 1)
        request = question.request
        engine = engine_for(request, question.config, question.name)
        size = request.micro_batch_size, request.seq_len
        self.allocated = engine.read(*size, self.device.constants).allocated
        self.managed = engine.managed

    def _engine(self, request: EstimateRequest) -> Engine | None:
        """Return the engine of a request of the same model, None where it is refused."""
        try:
            return engine_for(request, self.question.config, self.question.name)
        except EstimatorError:
            return None

    def difference(self, request: EstimateRequest) -> int | None:
        """Return what the meter would read more for a request, None where it is refused."""
        engine = self._engine(request)
        return None if engine is None else self.difference_of(engine, request)

    def difference_of(self, engine: Engine, request: EstimateRequest | None = None) -> int:
        """Return what the meter would read more with another engine, from its peak alone."""
        asked = request or self.question.request
        size = asked.micro_batch_size, asked.seq_len
        allocated = engine.read(*size, self.device.constants).allocated - self.allocated
        if self.reading.meter == "allocated":
            return allocated
        peak = self.base.peak
        held = peak.reserved_bytes.expected / peak.allocated_bytes.expected
        more = engine.managed - self.managed if self.reading.meter != "reserved" else 0
        return round(allocated * held) + more

    def left(self, difference: int) -> int:
        """Return what a difference does not explain; a lower bound may be exceeded."""
        left = self.gap - difference
        return max(0, left) if self.reading.bound == "at_least" else left

    def explained(self, difference: int) -> float:
        """Return the share of the gap that a difference explains."""
        left = abs(self.left(difference))
        return max(0.0, 1.0 - left / abs(self.gap)) if self.gap else 0.0


def at_meter(peak: Peak, meter: CardMeter) -> Range:
    """Return the range of what a meter reads."""
    if meter == "allocated":
        return peak.allocated_bytes
    return peak.reserved_bytes if meter == "reserved" else peak.device_used_bytes


def tried_terms(case: Case) -> Iterator[Tried]:
    """Yield every term that has an answer, with the change of the request behind it."""
    request = case.question.request
    for change in (*changes(request), *_fitted(case)):
        try:
            difference = case.difference(changed(request, change.fields))
        except EstimatorError:
            continue
        if difference is not None:
            document = document_of(request, change.fields)
            yield Tried(_term(change, document, difference), change)
    # What a message says, it says of a known meter and in known units.
    confusions = (*_meters(case), *_units(case)) if case.reading.bound == "reading" else ()
    beside = (*_cast_back(case), *_second_list(case), *_blocks(case), *_others(case))
    for term in (*beside, *confusions):
        yield Tried(term, None)


def _term(change: Change, document: dict[str, Any], difference: int) -> Term:
    return Term(
        change.name, change.summary, document, difference, change.plausibility, change.fitted
    )


def _fitted(case: Case) -> Iterator[Change]:
    """Yield the length and the micro-batch at which the estimate would be the measurement."""
    request = case.question.request
    length = _nearest(case, "/seq_len", request.seq_len, MAX_SEQ_LEN)
    if length not in (None, request.seq_len):
        yield Change(
            "another length", f"the longest batch has {length} tokens", {"/seq_len": length},
            "often", fitted=True,
        )  # fmt: skip
    size = _nearest(case, "/micro_batch_size", request.micro_batch_size, MAX_MICRO_BATCH_SIZE)
    if size not in (None, request.micro_batch_size):
        yield Change(
            "another micro-batch", f"the micro-batch is {size}", {"/micro_batch_size": size},
            "sometimes", fitted=True,
        )  # fmt: skip


_FARTHEST: Final = 8


def _nearest(case: Case, pointer: str, asked: int, most: int) -> int | None:
    """Return the number that explains best, found by doubling and halving; it only grows with it.

    Nobody is believed to have been farther off than by a factor of eight.
    """
    request = case.question.request

    def left(value: int) -> int | None:
        try:
            difference = case.difference(changed(request, {pointer: value}))
        except EstimatorError:
            return None
        return None if difference is None else case.gap - difference

    low, high = 1, min(most, _FARTHEST * asked)
    while high - low > 1:
        middle = (low + high) // 2
        found = left(middle)
        low, high = (low, middle) if found is None or found < 0 else (middle, high)
    ends = [(abs(found), value) for value in (low, high) if (found := left(value)) is not None]
    return min(ends)[1] if ends else None


def _cast_back(case: Case) -> Iterator[Term]:
    """Yield what older TRL does to a model that PEFT has prepared, and no request says.

    trl 0.13.0, trainer/utils.py, peft_module_casting_to_bf16, called by SFTTrainer under bf16:
    embeddings and head, which the preparation raised to fp32, become bf16 again; norms stay.
    """
    request = case.question.request
    asked = request.quantization
    prepared = asked is not None and asked.upcasts and asked.prepare_kbit
    if not prepared or request.autocast != "bf16":
        return
    asked_for = engine_for(request, case.question.config, case.question.name)
    run = asked_for.run
    outer = (*run.spec.embeddings, run.spec.head)

    def half(module: Module) -> Module:
        raised = any(module is each for each in outer) and module.dtype is DType.FLOAT32
        return replace(module, dtype=DType.BFLOAT16) if raised else module

    engine = Engine(replace(run, spec=run.spec.map_modules(half)), {}, asked_for.recipe)
    yield Term(
        "TRL casts back", "TRL casts embeddings and head back to bf16, as TRL 0.13 does", {},
        case.difference_of(engine), "often",
    )  # fmt: skip


def _second_list(case: Case) -> Iterator[Term]:
    """Yield what the foreach step of torch 2.0 holds beside that of today: a second list.

    torch 2.0.1, optim/adamw.py, _multi_tensor_adamw: the denominators are made anew of the square
    roots, which stay; later versions add in place.
    """
    request = case.question.request
    optimizer = request.optimizer
    if optimizer.name not in ("adam", "adamw") or optimizer.implementation == "fused":
        return
    run = engine_for(request, case.question.config, case.question.name).run
    if run.optimizer.implementation != "foreach" or run.optimizer.in_backward:
        return
    moments = {each.moment: each.bytes for each in case.base.timeline}
    step = moments.get("optimizer step", 0) + sum(step_temporaries(run))
    more = step - max(moments.values())
    if more > 0:
        yield Term(
            "foreach of torch 2.0", "torch is 2.0, whose foreach step holds a second list", {},
            more, "sometimes",
        )  # fmt: skip


def _meters(case: Case) -> Iterator[Term]:
    """Yield the readings of the other meters: one is easily taken for another."""
    own = case.predicted.expected
    others: tuple[tuple[CardMeter, str, Plausibility], ...] = (
        ("allocated", "the number is what tensors hold (max_memory_allocated)", "sometimes"),
        ("reserved", "the number is what the allocator holds (max_memory_reserved)", "often"),
        ("device-used", "the number is device memory in use, CUDA context included", "often"),
    )
    for meter, summary, plausibility in others:
        expected = at_meter(case.base.peak, meter).expected
        if at_meter(case.base.peak, case.reading.meter) is not at_meter(case.base.peak, meter):
            yield Term(f"meter: {meter}", summary, {}, expected - own, plausibility)


_DECIMAL: Final = ("GB", "MB", "kB", "KB", "TB")


def _units(case: Case) -> Iterator[Term]:
    """Yield the same digits with the other kind of prefix: 1024 or 1000."""
    unit = case.reading.written.strip().lstrip("0123456789. ")
    steps = {"k": 1, "m": 2, "g": 3, "t": 4}.get(unit[:1].lower())
    if steps is None:
        return
    ratio = (GiB / GB) ** (steps / 3)
    if unit in _DECIMAL:
        meant = case.measured * ratio
        summary = f"the number is in powers of 1024, though it says {unit}"
        yield Term("binary units", summary, {}, case.measured - round(meant), "often")
    else:
        meant = case.measured / ratio
        summary = f"the number is in powers of 1000, though it says {unit}"
        yield Term("decimal units", summary, {}, case.measured - round(meant), "often")


_EARLIER: Final = (4, 6, 7)


def _blocks(case: Case) -> Iterator[Term]:
    """Yield what the allocator would hold with expandable segments, or after shorter batches."""
    if case.reading.meter == "allocated":
        return
    request = case.question.request
    engine = engine_for(request, case.question.config, case.question.name)
    b, s, held = request.micro_batch_size, request.seq_len, case.base.peak.reserved_bytes.expected
    least = case.base.peak.allocated_bytes.expected
    growing = engine.blocks_under(b, s, case.device, settings=AllocatorSettings(True)).reserved
    yield Term(
        "expandable segments", "PYTORCH_ALLOC_CONF has expandable_segments:True", {},
        max(growing, least) - held, "sometimes",
    )  # fmt: skip
    earlier = tuple(max(1, s * eighths // 8) for eighths in _EARLIER)
    shorter = engine.blocks_under(b, s, case.device, earlier=earlier).reserved
    lengths = ", ".join(str(each) for each in earlier)
    yield Term(
        "blocks of other lengths",
        f"shorter batches came before, here of {lengths} tokens, and their blocks are still held",
        {}, max(shorter, least) - held, "often",
    )  # fmt: skip


def _others(case: Case) -> Iterator[Term]:
    if case.reading.meter == "nvidia-smi" and case.gap > 0:
        yield Term(
            "others on the card", f"other processes or the display hold {gib(case.gap)}", {},
            case.gap, "sometimes", fitted=True,
        )  # fmt: skip
