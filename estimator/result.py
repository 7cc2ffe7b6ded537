"""The result document `estimate/v1`: what every engine answers, through every door."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from estimator.components import COMPONENTS as COMPONENTS
from estimator.components import Basis as Basis
from estimator.components import Component as Component

Verdict = Literal["fits", "tight", "does_not_fit", "unknown"]
Engine = Literal["analytic", "dry-run", "measurement"]


class Range(Struct, frozen=True):
    """A prediction: low <= expected <= high [bytes]."""

    low: int
    expected: int
    high: int


class ResultRow(Struct, frozen=True):
    """One kind of tensor that is alive at the peak.

    Args:
        name: what it is, with its place in the model.
        site: where in the step it lives: embeddings, layer, final_norm, head, loss, optimizer,
            process.
        count: how many such tensors are alive.
        bytes: all of them together [bytes].
        formula: the formula with this request's numbers in it.
        source: the key and the place that justify it.
        basis: formula, measured or assumed.
    """

    name: str
    site: str
    count: int
    bytes: int
    formula: str
    source: str
    basis: Basis


class ComponentRows(Struct, frozen=True):
    """One component of the peak and its rows, largest first; `bytes` is their sum."""

    component: Component
    bytes: int
    rows: tuple[ResultRow, ...]


class MomentBytes(Struct, frozen=True):
    """Allocated bytes of each component at one moment of the step, block rounding included."""

    moment: str
    bytes: int
    components: dict[str, int]


class RunnerUp(Struct, frozen=True):
    """The second highest moment and how far it lies below the peak [bytes]."""

    moment: str
    gap_bytes: int


class Peak(Struct, frozen=True):
    """The highest moment of the step, in quantities that are never mixed.

    Args:
        allocated_bytes: what `torch.cuda.max_memory_allocated` reads.
        reserved_bytes: what `torch.cuda.max_memory_reserved` reads.
        device_used_bytes: what the driver shows: reserved, CUDA context, managed memory.
        needed_bytes: the least device memory with which the run does not run out; the verdict
            compares it with the capacity, because cached blocks are given back under pressure.
        host_bytes: host memory of the process.
    """

    moment: str
    runner_up: RunnerUp | None
    allocated_bytes: Range
    reserved_bytes: Range
    device_used_bytes: Range
    needed_bytes: Range
    host_bytes: Range


class Promise(Struct, frozen=True):
    """What the range of one quantity rests on.

    Args:
        spread: measured over expected lies between 1 / (1 + spread) and 1 + spread.
        rows, groups: how many measurements, and of how many sources or model families.
        outside: what this request has that none of them had.
        widened: the factor on the spread for that; 1 where the request is like them.
        reason: the same in one sentence.
    """

    quantity: str
    spread: float
    rows: int
    groups: int
    outside: tuple[str, ...]
    widened: float
    reason: str


class Promises(Struct, frozen=True):
    """The confidence of the ranges, and where it comes from.

    Args:
        calibration: the name of the file in `data/calibration/`.
        confidence: the share of measurements that a range is meant to hold.
    """

    calibration: str
    confidence: float
    ranges: tuple[Promise, ...]


class Capacity(Struct, frozen=True):
    """What the driver really offers to this process [bytes]; None without a GPU in the request."""

    gpu: str | None
    usable_bytes: int | None
    source: str


class Parameters(Struct, frozen=True):
    """Parameter counts; tied tensors are counted once."""

    total: int
    trainable: int
    active: int


class Limits(Struct, frozen=True):
    """The inverse answers: the largest run that still fits, and the smallest card that would do.

    A size is None without a GPU to judge by; 0 says that not even 1 fits.
    """

    max_micro_batch_size: int | None
    max_seq_len: int | None
    smallest_gpu: str | None
    min_gpus: int | None


class Suggestion(Struct, frozen=True):
    """A change of the request that saves memory, with its price and what the verdict becomes.

    Args:
        saves_bytes: how much less the tensors take at the peak.
    """

    change: dict[str, Any]
    summary: str
    saves_bytes: int
    cost: Literal["none", "slower", "changes training"]
    verdict_after: Verdict


class WaterfallStep(Struct, frozen=True):
    """One step from naive full fine-tuning to the requested recipe.

    Args:
        summary: the technique that this step adds; the first is the start, which adds none.
        change: the fields of the request that it sets.
        saves_bytes: how much less the run needs than a step before; negative where it needs more,
            and 0 where another moment of the step is the peak, which a later technique lowers.
        worth_bytes: how much more the requested run would need without it; None where the other
            techniques have no answer without it.
        needed_bytes: what the run needs with it, as `peak.needed_bytes.expected`.
        moment: where the step peaks with it.
        cost, price: what it costs, as a class and in words.
    """

    summary: str
    change: dict[str, Any]
    saves_bytes: int
    worth_bytes: int | None
    needed_bytes: int
    moment: str
    verdict: Verdict
    cost: Literal["none", "slower", "changes training"]
    price: str


class Result(Struct, frozen=True):
    """The whole answer to one request.

    Args:
        breakdown: what is allocated at the peak; its rows sum to `peak.allocated_bytes.expected`.
        outside: what lies between that and `peak.device_used_bytes.expected`.
        waterfall: what each technique saves, where the request asks for it; its last step needs
            what the request needs.
    """

    schema: Literal["estimate/v1"]
    engine: Engine
    model: str
    verdict: Verdict
    message: str
    peak: Peak
    capacity: Capacity
    breakdown: tuple[ComponentRows, ...]
    timeline: tuple[MomentBytes, ...]
    parameters: Parameters
    limits: Limits
    suggestions: tuple[Suggestion, ...]
    request: dict[str, Any]
    promises: Promises
    outside: tuple[ResultRow, ...] = ()
    waterfall: tuple[WaterfallStep, ...] = ()
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()
    versions: dict[str, str] = {}
