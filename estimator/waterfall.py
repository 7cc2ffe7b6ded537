"""The waterfall: from naive full fine-tuning to the requested recipe, one technique at a time.

The start is what a first script does: every weight trained by AdamW in mixed precision, attention
that keeps its scores, a loss on whole logits, nothing recomputed. The batch, the length, the model
and the software stay as requested. The order is the one in which a person would try things: first
what costs nothing, then what costs time, then what changes the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from estimator.optimizer import Optimizer
from estimator.planner import Needs, Question, is_answered, needs
from estimator.request import EstimateRequest, Loop
from estimator.result import WaterfallStep
from estimator.techniques.methods.full import Full
from estimator.techniques.optimizers import OPTIMIZERS

Cost = Literal["none", "slower", "changes training"]

# The work itself, and how it is asked for: the same from the first step to the last.
WORKLOAD: Final = (
    "model", "task", "micro_batch_size", "seq_len", "sample_lengths", "gradient_accumulation_steps",
    "padding", "packing", "parallelism", "hardware", "software", "confidence", "waterfall",
)  # fmt: skip

NAIVE: Final[dict[str, Any]] = {
    "precision": "amp_bf16",
    "attention": "eager",
    "optimizer": Optimizer(name="adamw", implementation="foreach"),
}
"""Where the start differs from the defaults of the request: 16 bytes for each parameter and every
attention score. Every other field of the recipe starts at its default."""

_CHANGES_TRAINING: Final = frozenset(
    {"neftune_noise_alpha", "label_smoothing_factor", "max_grad_norm", "logits_to_keep"}
)

_ADAMW_ELSEWHERE: Final = frozenset({"paged_adamw_32bit", "torchao_cpu_offload"})


class _Change(Struct, frozen=True):
    """One technique: the fields that it sets, as words, and what it costs."""

    fields: dict[str, Any]
    summary: str
    cost: Cost
    price: str


_NOTHING: Final = _Change({}, "", "none", "")
ChangeOf = Callable[[EstimateRequest, EstimateRequest], _Change | None]
"""What leads from one request towards another in one respect; None where they agree in it."""


def waterfall(question: Question) -> tuple[WaterfallStep, ...]:
    """Return the start and one step for each technique of the request.

    A technique that has no answer yet, because it takes another one first, waits for that; what
    has one only together is one step. Where the start itself has no answer, such as for software
    with attention of its own, it takes over from the request what it cannot do without.
    """
    start, before = _start(question)
    steps = [_first(start, before)]
    current, waiting = start, ORDER
    while current != question.request:
        found = _next(question, current, waiting)
        after = needs(question, found.request)
        if after is None:
            raise AssertionError("a step of the waterfall was chosen because it has an answer")
        without = question.request
        for change_of in found.used:
            without = _with(without, change_of(without, start))
        steps.append(_step(question, found.change, (before, after), without))
        current, before = found.request, after
        waiting = tuple(each for each in waiting if each not in found.used)
    return tuple(steps)


class _Next(Struct, frozen=True):
    """The techniques of one step, what they change, and the request with them."""

    used: tuple[ChangeOf, ...]
    change: _Change
    request: EstimateRequest


def _next(question: Question, current: EstimateRequest, waiting: tuple[ChangeOf, ...]) -> _Next:
    """Return the first technique that has an answer now, or as few as have one together."""
    changes = [(each, each(current, question.request)) for each in waiting]
    known = [(each, change) for each, change in changes if change is not None]
    if not known:
        raise AssertionError("a field of the request is neither in WORKLOAD nor in ORDER")
    for change_of, change in known:
        changed = _with(current, change)
        if is_answered(question, changed):
            return _Next((change_of,), change, changed)
    used: tuple[ChangeOf, ...] = ()
    joined, changed = _NOTHING, current
    for change_of, _ in known:
        further = change_of(changed, question.request)
        if further is None:
            continue
        used, joined = (*used, change_of), _joined(joined, further)
        changed = _with(changed, further)
        if is_answered(question, changed):
            break
    return _Next(used, joined, changed)


def _start(question: Question) -> tuple[EstimateRequest, Needs]:
    """Return the naive request and what it needs.

    Raises:
        EstimatorError: not even the request itself has an answer.
    """
    request = question.request
    naive = EstimateRequest(**{name: getattr(request, name) for name in WORKLOAD}, **NAIVE)
    if request.precision == "fp32" and request.autocast is not None:
        # The same storage in other words.
        naive = replace(naive, precision=request.precision, autocast=request.autocast)
    for candidate in _starts(naive, request):
        found = needs(question, candidate) if is_answered(question, candidate) else None
        if found is not None:
            return candidate, found
    raise AssertionError("the request was answered before its waterfall was asked for")


def _starts(naive: EstimateRequest, request: EstimateRequest) -> Iterator[EstimateRequest]:
    """Yield the naive start, then starts with ever more of the request in them."""
    yield naive
    for change_of in ORDER:
        yield _with(naive, change_of(naive, request))
    taken = naive
    for change_of in ORDER:
        taken = _with(taken, change_of(taken, request))
        yield taken


def _with(request: EstimateRequest, change: _Change | None) -> EstimateRequest:
    return request if change is None else replace(request, **change.fields)


def _joined(one: _Change, other: _Change) -> _Change:
    """Return two techniques as one step: the dearer class of cost, and both in words."""
    if not one.fields:
        return other
    return _Change(
        {**one.fields, **other.fields},
        f"{one.summary}, {other.summary}",
        max(one.cost, other.cost, key=_RANK.__getitem__),
        one.price if one.price == other.price else f"{one.price}; {other.price}",
    )


def _first(start: EstimateRequest, found: Needs) -> WaterfallStep:
    return WaterfallStep(
        summary="naive full fine-tuning" if start.method == Full() else "where this can start",
        change={},
        saves_bytes=0,
        worth_bytes=None,
        needed_bytes=found.bytes,
        moment=found.moment,
        verdict=found.verdict,
        cost="none",
        price=_said(start),
    )


def _step(
    question: Question, change: _Change, around: tuple[Needs, Needs], undone: EstimateRequest
) -> WaterfallStep:
    """Return the step of a change, given what is needed before and after it.

    Args:
        undone: the request without this change.
    """
    before, after = around
    whole, without = needs(question, question.request), needs(question, undone)
    worth = None if whole is None or without is None else without.bytes - whole.bytes
    return WaterfallStep(
        summary=change.summary,
        change=msgspec.to_builtins(change.fields),
        saves_bytes=before.bytes - after.bytes,
        worth_bytes=worth,
        needed_bytes=after.bytes,
        moment=after.moment,
        verdict=after.verdict,
        cost=change.cost,
        price=change.price,
    )


_RANK: Final = {"none": 0, "slower": 1, "changes training": 2}


def _said(request: EstimateRequest) -> str:
    """Say what the start is."""
    optimizer = request.optimizer
    return (
        f"method {request.method.name}, precision {request.precision}, {optimizer.name} "
        f"{optimizer.implementation or ''}, attention {request.attention}, loss {request.loss}, "
        f"checkpointing {request.activation_checkpointing}"
    ).replace(" ,", ",")


# -- the techniques, in their order ------------------------------------------------------------


def _field(name: str, cost: Cost, price: str) -> ChangeOf:
    """Return the step of one field that is a word."""

    def change(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
        value = getattr(asked, name)
        if getattr(current, name) == value:
            return None
        words = ", ".join(value) if isinstance(value, tuple) else value
        return _Change({name: value}, f"{name.replace('_', ' ')} {words or 'none'}", cost, price)

    return change


def _loop(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    """Return the step of what the training loop keeps and adds."""
    changed = [
        name for name in Loop.__struct_fields__
        if getattr(current.loop, name) != getattr(asked.loop, name)
    ]  # fmt: skip
    if not changed:
        return None
    words = ", ".join(f"{name} {_word(getattr(asked.loop, name))}" for name in changed)
    differs = _CHANGES_TRAINING.intersection(changed)
    return _Change(
        {"loop": asked.loop},
        f"loop: {words}",
        "changes training" if differs else "none",
        "the loss or its gradients are others" if differs else "the same numbers",
    )


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _implementation(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    """Return the step to another implementation of the optimizer that the start has."""
    mine, wanted = current.optimizer, asked.optimizer
    if mine.name != wanted.name or mine.implementation == wanted.implementation:
        return None
    changed = replace(mine, implementation=wanted.implementation)
    words = f"{wanted.implementation or OPTIMIZERS[wanted.name].default} {wanted.name}"
    return _Change({"optimizer": changed}, words, "none", "the same numbers up to rounding")


def _optimizer(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    """Return the step to the requested optimizer, where it runs staying as it is."""
    wanted = replace(asked.optimizer, in_backward=current.optimizer.in_backward)
    if current.optimizer == wanted:
        return None
    words = f"optimizer {wanted.name}"
    if wanted.name in _ADAMW_ELSEWHERE:
        price = "the same update; states or weights cross to the host and back"
        return _Change({"optimizer": wanted}, words, "slower", price)
    price = "another update rule, or rounded states"
    return _Change({"optimizer": wanted}, words, "changes training", price)


def _in_backward(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    where = asked.optimizer.in_backward
    if current.optimizer.in_backward == where:
        return None
    return _Change(
        {"optimizer": replace(current.optimizer, in_backward=where)},
        "optimizer in backward",
        "none",
        "gradients can be neither accumulated nor clipped by their common norm",
    )


def _precision(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    same = (current.precision, current.autocast) == (asked.precision, asked.autocast)
    if same:
        return None
    beside = f" with autocast {asked.autocast}" if asked.autocast else ""
    slower = asked.precision == "fp32" and asked.autocast is None
    return _Change(
        {"precision": asked.precision, "autocast": asked.autocast},
        f"precision {asked.precision}{beside}",
        "slower" if slower else "changes training",
        "products in fp32" if slower else "weights or their updates are rounded otherwise",
    )


def _checkpointing(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    value = asked.activation_checkpointing
    if current.activation_checkpointing == value:
        return None
    price = "what is not kept is computed once more in backward"
    if value == "save_on_cpu":
        price = "what forward keeps crosses to the host and back"
    elif "offload" in value:
        price += ", and what is kept crosses to the host and back"
    return _Change(
        {"activation_checkpointing": value}, f"activation checkpointing {value}", "slower", price
    )


def _method(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    if current.method == asked.method:
        return None
    rank = getattr(asked.method, "r", None)
    words = f"method {asked.method.name}" + (f", r={rank}" if isinstance(rank, int) else "")
    return _Change(
        {"method": asked.method}, words, "changes training", "fewer weights, or other ones, learn"
    )


def _quantization(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    if current.quantization == asked.quantization:
        return None
    name = "none" if asked.quantization is None else asked.quantization.name
    return _Change(
        {"quantization": asked.quantization},
        f"quantization {name}",
        "changes training",
        "the frozen weights are rounded, and unpacked in every pass",
    )


def _fp8(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    if current.fp8 == asked.fp8:
        return None
    name = "none" if asked.fp8 is None else asked.fp8.name
    price = "the factors of products are rounded to 8 bits"
    return _Change({"fp8": asked.fp8}, f"fp8 {name}", "changes training", price)


def _qat(current: EstimateRequest, asked: EstimateRequest) -> _Change | None:
    if current.qat == asked.qat:
        return None
    name = "none" if asked.qat is None else asked.qat.name
    price = "weights and inputs are rounded before each product"
    return _Change({"qat": asked.qat}, f"qat {name}", "changes training", price)


_SAME: Final = "the same numbers up to rounding"
ORDER: Final[tuple[ChangeOf, ...]] = (
    _field("attention", "none", _SAME),
    _field("kernels", "none", _SAME),
    _field("loss", "none", _SAME),
    _implementation,
    _loop,
    _checkpointing,
    _precision,
    _optimizer,
    _in_backward,
    _method,
    _quantization,
    _fp8,
    _qat,
)
