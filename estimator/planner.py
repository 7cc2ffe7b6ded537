"""The inverse answers: the largest run that fits, the smallest card, the changes that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, Literal

from msgspec import Struct

from estimator.calibration import Work
from estimator.catalog import Gpu, gpus
from estimator.errors import EstimatorError
from estimator.pipeline import Device, Engine, Reading, device_of, engine_for
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


def needs(question: Question, request: EstimateRequest) -> Needs | None:
    """Return what a request needs of the question's model and card, None where it is refused."""
    device = device_of(question.gpu, request)
    try:
        engine = engine_for(request, question.config, question.name)
        reading = engine.read(request.micro_batch_size, request.seq_len, device.constants)
    except EstimatorError:
        return None
    work = Work(request.micro_batch_size * request.seq_len, request.seq_len)
    needed = reading.needed(device.ranges(engine.recipe), work)
    return Needs(needed.expected, reading.moment.name, judge(needed, device.capacity.usable_bytes))


def limits(question: Question) -> Limits:
    """Return the largest micro-batch and length that fit, and the smallest card that would do."""
    request = question.request
    engine = engine_for(request, question.config, question.name)
    device = device_of(question.gpu, request)
    batch = length = None
    if device.capacity.usable_bytes is not None:
        longest = engine.run.spec.max_positions or MAX_SEQ_LEN
        batch = _largest(
            lambda b: engine.verdict(b, request.seq_len, device) == "fits", MAX_MICRO_BATCH_SIZE
        )
        length = _largest(
            lambda s: engine.verdict(request.micro_batch_size, s, device) == "fits", longest
        )
    return Limits(
        max_micro_batch_size=batch,
        max_seq_len=length,
        smallest_gpu=_smallest_gpu(engine, request),
        min_gpus=_min_gpus(engine, request, device),
    )


def _min_gpus(engine: Engine, request: EstimateRequest, device: Device) -> int | None:
    """Return 1 where one card does; more cards hold copies, so they do not help here."""
    verdict = engine.verdict(request.micro_batch_size, request.seq_len, device)
    return 1 if verdict == "fits" else None


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


def _smallest_gpu(engine: Engine, request: EstimateRequest) -> str | None:
    """Return the card with the least usable memory on which the request fits.

    Laptop cards are left out, and so are cards without the kernels that the request asks for.
    """
    b, s = request.micro_batch_size, request.seq_len
    readings: dict[int, Reading] = {}
    least = engine.least_bytes(b, s)
    for gpu in _candidates(request):
        if (gpu.usable_bytes or 0) < least:
            continue
        device = device_of(gpu, request)
        workspace = device.constants.cublas_workspace
        if workspace not in readings:
            readings[workspace] = engine.read(b, s, device.constants)
        needed = readings[workspace].needed(device.ranges(engine.recipe), Work(b * s, s))
        if judge(needed, gpu.usable_bytes) == "fits":
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
    document = question.request.to_dict()
    found = []
    for change in _changes(question.request):
        after = needs(question, convert_request({**document, **change.fields}))
        if after is None or before is None or after.bytes >= before.bytes:
            continue
        found.append(
            Suggestion(
                change=change.fields,
                summary=change.summary,
                saves_bytes=before.bytes - after.bytes,
                cost=change.cost,
                verdict_after=after.verdict,
            )
        )
    settled = before is not None and before.verdict in ("fits", "unknown")
    return tuple(sorted(found, key=_most_saved if settled else _cheapest_that_fits)[:SHOWN])


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
