"""The inverse answers: the largest run that fits, the smallest card, the changes that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

from msgspec import Struct, structs

from estimator.catalog import Gpu, gpus
from estimator.errors import EstimatorError
from estimator.memory.lengths import UNKNOWN, Lengths
from estimator.pipeline import Device, Engine, Reading, device_of, engine_for, lengths_in
from estimator.request import (
    MAX_MICRO_BATCH_SIZE,
    MAX_SEQ_LEN,
    EstimateRequest,
    convert_request,
)
from estimator.result import Limits, Suggestion, Verdict
from estimator.techniques.methods.lora import Lora
from estimator.techniques.methods.partial import Partial
from estimator.verdict import judge

SHOWN: Final = 3
# Beside those shown, how many are looked at closely.
SPARE: Final = 1
# What the allocator cannot give back is no more than this, as a multiple of the allocated peak: the
# most of the orders that benchmarks/orders.py replays, with either seed, is 1.30.
MOST_SHARE: Final = 1.4
_RANK: Final = {"none": 0, "slower": 1, "changes training": 2}


class Question(Struct, frozen=True):
    """A request with its model and card, as the planner varies it."""

    request: EstimateRequest
    config: Mapping[str, Any]
    name: str
    gpu: Gpu | None


class Needs(Struct, frozen=True):
    """What a varied request needs [bytes], at which moment, and whether that fits."""

    bytes: int
    moment: str
    verdict: Verdict


class _Found(NamedTuple):
    """The engine of a varied request on its device, and what it reads there."""

    engine: Engine
    device: Device
    reading: Reading


def _found(question: Question, request: EstimateRequest) -> _Found | None:
    """Return what a request is answered with, None where it is refused."""
    device = device_of(question.gpu, request)
    try:
        engine = engine_for(request, question.config, question.name)
        reading = engine.read(request.micro_batch_size, request.seq_len, device.constants)
    except EstimatorError:
        return None
    return _Found(engine, device, reading)


def needs(question: Question, request: EstimateRequest) -> Needs | None:
    """Return what a request needs of the question's model and card, None where it is refused."""
    found = _found(question, request)
    if found is None:
        return None
    b, s = request.micro_batch_size, request.seq_len
    needed = found.engine.needed(b, s, found.device, lengths_in(request))
    verdict = judge(needed, found.device.capacity.usable_bytes)
    return Needs(needed.expected, found.reading.moment.name, verdict)


class _Rough(Struct, frozen=True):
    """The allocated peak of a request [bytes], and whether that fits."""

    allocated: int
    verdict: Verdict


def _rough(question: Question, request: EstimateRequest, share: float = 1.0) -> _Rough | None:
    """Return what is known of a request without a replay, None where it is refused.

    Args:
        share: what the allocator cannot give back, as a multiple of the allocated peak.
    """
    found = _found(question, request)
    if found is None:
        return None
    b, s = request.micro_batch_size, request.seq_len
    unknown = _lengths_at_other_sizes(request).unknown
    verdict = found.engine.rough_verdict(b, s, found.device, share, unknown=unknown)
    return _Rough(found.reading.allocated, verdict)


def _lengths_at_other_sizes(request: EstimateRequest) -> Lengths:
    """Return what is known of lengths elsewhere; orders of samples are not replayed there."""
    found = lengths_in(request)
    return UNKNOWN if found.samples else found


def is_answered(question: Question, request: EstimateRequest) -> bool:
    """Say whether a request has an answer."""
    return _found(question, request) is not None


def limits(question: Question) -> Limits:
    """Return the largest micro-batch and length that fit, and the smallest card that would do."""
    request = question.request
    engine = engine_for(request, question.config, question.name)
    device = device_of(question.gpu, request)
    b, s = request.micro_batch_size, request.seq_len
    batch = length = None
    if device.capacity.usable_bytes is not None:
        longest = engine.run.spec.max_positions or MAX_SEQ_LEN
        lengths = _lengths_at_other_sizes(request)
        share = engine.share(b, s, device, lengths)
        batch = _largest_that_fits(
            lambda n: _Size(engine, n, s, device, lengths), b, MAX_MICRO_BATCH_SIZE, share
        )
        length = _largest_that_fits(
            lambda n: _Size(engine, b, n, device, lengths), s, longest, share
        )
    return Limits(
        max_micro_batch_size=batch,
        max_seq_len=length,
        smallest_gpu=_smallest_gpu(engine, request, device),
        min_gpus=_min_gpus(engine, request, device),
    )


def _min_gpus(engine: Engine, request: EstimateRequest, device: Device) -> int | None:
    """Return 1 where one card does; more cards hold copies, so they do not help here."""
    b, s = request.micro_batch_size, request.seq_len
    return 1 if engine.verdict(b, s, device, lengths_in(request)) == "fits" else None


class _Size(NamedTuple):
    """A micro-batch and length of an engine on a device."""

    engine: Engine
    micro_batch_size: int
    seq_len: int
    device: Device
    lengths: Lengths

    def refused_share(self) -> float | None:
        """Return None where it fits after a replay, else what could not be given back then."""
        return self.engine.refused_share(*self[1:])

    def roughly_fits(self, share: float) -> bool:
        """Say the same without one, as if so much could not be given back."""
        return self.engine.rough_verdict(*self[1:4], share, unknown=self.lengths.unknown) == "fits"

    def share(self) -> float:
        """Return what the allocator cannot give back, as a multiple of the allocated peak."""
        return self.engine.share(*self[1:])


def _largest_that_fits(size: Callable[[int], _Size], asked: int, most: int, share: float) -> int:
    """Return the largest number up to `most` of which a replay was seen to say that it fits.

    Replays take long, so where to look next is sought without them, with what the last one said.
    Such a guess is raised once before it is refused. Where it is belied by what is known to fit, or
    leaves nothing, half of what was refused is looked at.

    Args:
        asked: the number that was asked for, which is replayed already.
        share: what the allocator cannot give back there, as a multiple of the allocated peak.
    """

    def edge(share: float, most: int) -> int:
        return _largest(lambda n: size(n).roughly_fits(share), most) if most > 0 else 0

    # With nothing that cannot be given back but what is allocated.
    most = edge(1.0, most)
    fits, refused, raises = 0, most + 1, 2
    aim = asked if asked <= most else edge(share, most) or most
    while aim > fits:
        found = size(aim).refused_share()
        if found is not None:
            refused, raises = aim, max(0, raises - 1)
            aim = edge(found, refused - 1)
            if aim <= fits:
                aim, raises = refused // 2, 1
        elif raises:
            fits, raises = aim, raises - 1
            aim = edge(size(aim).share(), refused - 1)
        else:
            return aim
    return fits


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, 0 if not even 1 does.

    What a run needs grows with the number, so doubling and halving find the edge.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smallest_gpu(engine: Engine, request: EstimateRequest, asked: Device) -> str | None:
    """Return the card with the least usable memory on which the request fits.

    Laptop cards are left out, and so are cards without the kernels that the request asks for.
    """
    b, s = request.micro_batch_size, request.seq_len
    lengths = lengths_in(request)
    share, least = engine.share(b, s, asked, lengths), engine.least_bytes(b, s)
    for gpu in _candidates(request):
        if (gpu.usable_bytes or 0) < least:
            continue
        device = device_of(gpu, request)
        if engine.rough_verdict(b, s, device, share, unknown=lengths.unknown) != "fits":
            continue
        if engine.verdict(b, s, device, lengths) == "fits":
            return gpu.key
    return None


def _candidates(request: EstimateRequest) -> list[Gpu]:
    half = request.precision in ("bf16", "amp_bf16", "master_bf16", "megatron_bf16")
    flash = request.attention == "flash_attention_2"
    eight = request.fp8 is not None
    return [
        gpu
        for gpu in _by_memory()
        if (gpu.bf16_supported or not half)
        and (gpu.flash_attention_2_supported or not flash)
        and (gpu.multiplies_in_8_bits or not eight)
    ]


@lru_cache(maxsize=1)
def _by_memory() -> list[Gpu]:
    cards = [
        gpu
        for gpu in gpus()
        if gpu.vendor == "NVIDIA" and not gpu.laptop and gpu.usable_bytes is not None
    ]
    return sorted(cards, key=lambda gpu: (gpu.usable_bytes or 0, gpu.key))


# -- suggestions -------------------------------------------------------------------------------


class _Change(Struct, frozen=True):
    fields: dict[str, Any]
    summary: str
    cost: Literal["none", "slower", "changes training"]


def suggestions(question: Question) -> tuple[Suggestion, ...]:
    """Return up to three changes that make the run fit cheapest, or else save most."""
    before = needs(question, question.request)
    if before is None:
        return ()
    rank = _most_saved if before.verdict in ("fits", "unknown") else _cheapest_that_fits
    first = sorted(_rough_suggestions(question), key=rank)[: SHOWN + SPARE]
    checked = [_checked(question, each) for each in first[:SHOWN]]
    if [rank(each) for each in checked] != [rank(each) for each in first[:SHOWN]]:
        checked += (_checked(question, each) for each in first[SHOWN:])
    return tuple(sorted(checked, key=rank)[:SHOWN])


def _rough_suggestions(question: Question) -> Iterator[Suggestion]:
    """Yield the changes that make the tensors less, with what is known without a replay."""
    request = question.request
    before = _rough(question, request)
    if before is None:
        return
    document = request.to_dict()
    for change in _changes(request):
        after = _rough(question, convert_request({**document, **change.fields}))
        if after is None or after.allocated >= before.allocated:
            continue
        yield Suggestion(
            change=change.fields,
            summary=change.summary,
            saves_bytes=before.allocated - after.allocated,
            cost=change.cost,
            verdict_after=after.verdict,
        )


def _checked(question: Question, rough: Suggestion) -> Suggestion:
    """Return a suggestion whose verdict a replay backs, where it could be another."""
    changed = convert_request({**question.request.to_dict(), **rough.change})
    sure = _rough(question, changed, MOST_SHARE)
    if rough.verdict_after != "fits" or sure is None or sure.verdict == "fits":
        return rough
    after = needs(question, changed)
    return rough if after is None else structs.replace(rough, verdict_after=after.verdict)


def _most_saved(each: Suggestion) -> tuple[int, int, int]:
    return (0, 0, -each.saves_bytes)


def _cheapest_that_fits(each: Suggestion) -> tuple[int, int, int]:
    """Rank what fits before what does not, then the cheap before the dear, then by saving."""
    fits = 0 if each.verdict_after == "fits" else 1
    return (fits, _RANK[each.cost] if fits == 0 else 0, -each.saves_bytes)


def _changes(request: EstimateRequest) -> Iterator[_Change]:
    """Yield what may be changed: first what costs nothing, then what slows, then what differs."""
    if request.attention == "eager":
        yield _Change({"attention": "sdpa"}, "attention sdpa", "none")
    if request.padding and request.attention != "flash_attention_2":
        change = {"attention": "flash_attention_2"}
        yield _Change(change, "attention flash_attention_2, which needs no dense mask", "none")
    if request.loop.keep_outputs:
        loop = {**request.loop.to_dict(), "keep_outputs": False}
        yield _Change({"loop": loop}, "drop the outputs before backward", "none")
    if isinstance(request.method, Partial) and not request.method.freeze_others:
        frozen = {**request.method.to_dict(), "freeze_others": True}
        yield _Change({"method": frozen}, "freeze what the optimizer leaves out", "none")
    if request.loss == "standard":
        yield _Change({"loss": "cut_cross_entropy"}, "loss cut_cross_entropy, no logits", "none")
    if request.optimizer.name in ("adam", "adamw"):
        if request.optimizer.implementation in ("foreach", "single"):
            fused = {**request.optimizer.to_dict(), "implementation": "fused"}
            yield _Change({"optimizer": fused}, f"fused {request.optimizer.name}", "none")
        small = {"name": "adamw_8bit"}
        yield _Change({"optimizer": small}, "optimizer adamw_8bit", "changes training")
    if request.activation_checkpointing == "none":
        change = {"activation_checkpointing": "full"}
        yield _Change(change, "full activation checkpointing", "slower")
    if request.fp8 is not None:
        yield _Change({"fp8": None}, "products in full width instead of 8 bits", "slower")
    if request.micro_batch_size > 1:
        steps = request.gradient_accumulation_steps * request.micro_batch_size
        yield _Change(
            {"micro_batch_size": 1, "gradient_accumulation_steps": steps},
            f"micro-batch 1 with {steps} accumulation steps (same global batch)",
            "slower",
        )
    if request.precision in ("fp32", "amp_bf16", "amp_fp16") and request.quantization is None:
        yield _Change({"precision": "bf16"}, "bf16 weights", "changes training")
    if not isinstance(request.method, Lora):
        yield _Change({"method": {"name": "lora"}}, "LoRA, r=16, all-linear", "changes training")
    if request.quantization is None and request.precision in ("bf16", "fp16", "fp32"):
        method = request.method if isinstance(request.method, Lora) else Lora()
        packed: dict[str, Any] = {"method": method.to_dict()}
        packed["quantization"] = {"name": "nf4"}
        if request.activation_checkpointing == "none":
            packed["activation_checkpointing"] = "full"
        yield _Change(packed, "QLoRA (nf4) with full checkpointing", "changes training")
    if request.seq_len > 1:
        half = request.seq_len // 2
        yield _Change({"seq_len": half}, f"length {half}", "changes training")
