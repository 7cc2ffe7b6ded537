"""What torch's counters do not show: device constants, and how far a measurement may lie.

The spread of a quantity comes from measurement records through a calibration file. What nothing
measures yet is a prior from upstream sources, and an assumption that the result names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from msgspec import Struct

from estimator.calibration_file import (
    Calibration,
    Chosen,
    Quantity,
    Stratum,
    Traits,
    chosen,
    installed,
)
from estimator.result import Promise, Promises, Range
from estimator.sources import Assumption, Cite
from estimator.units import GiB, KiB, MiB

HANDLES: Final = 2
"""cuBLAS workspaces: one for the main thread's handle, one for the backward thread's."""


class DeviceConstants(Struct, frozen=True):
    """Memory that a process needs on one architecture beside its tensors [bytes].

    Args:
        cublas_workspace: one workspace of cuBLAS, held by the caching allocator for ever.
        context: CUDA context and loaded kernels after a training step.
        context_source: why the context is taken to be that.
    """

    cublas_workspace: int
    cublas_source: Cite
    context: Range
    context_source: Assumption


_HOPPER: Final = 32 * MiB
_OTHERS: Final = 2 * 4096 * KiB + 8 * 16 * KiB
_CUBLAS: Final = Cite("torch-cublas", "parseChosenWorkspaceSize and getNewWorkspace")


def _context(low: float, expected: float, high: float, reason: str) -> tuple[Range, Assumption]:
    return Range(round(low * GiB), round(expected * GiB), round(high * GiB)), Assumption(reason)


_DATACENTER: Final = _context(
    0.40, 0.72, 0.95,
    "CUDA context with lazily loaded kernels on a data-centre card: 0.55 GiB, give or take 0.15, "
    "and 0.1 to 0.25 GiB more as kernels load during training; not measured on this card yet",
)  # fmt: skip
_CONSUMER: Final = _context(
    0.30, 0.62, 0.85,
    "CUDA context with lazily loaded kernels: 0.45 GiB, give or take 0.15, and 0.1 to 0.25 GiB "
    "more as kernels load during training; not measured on this card yet",
)  # fmt: skip


_in_use: tuple[Calibration, ...] | None = None


@contextlib.contextmanager
def using(*calibrations: Calibration) -> Iterator[None]:
    """Answer from these calibrations instead of the installed ones while the block lasts."""
    global _in_use
    before, _in_use = _in_use, calibrations
    forget()
    try:
        yield
    finally:
        _in_use = before
        forget()


def forget() -> None:
    """Read the calibration files anew with the next answer."""
    for cached in (installed, choose, ranges):
        cached.cache_clear()


@lru_cache(maxsize=256)
def choose(gpu: str | None, compute_capability: str, software: str) -> Chosen:
    """Return the calibrations in use that speak about a card, of software as near as there is."""
    known = installed() if _in_use is None else _in_use
    return chosen(known, gpu, compute_capability, software)


KIN: Final = 1.5
"""How much wider the figures of another card of the same architecture are taken; a choice."""


def device_constants(
    compute_capability: str, gpu: str | None = None, software: str = ""
) -> DeviceConstants:
    """Return the constants of a card: measured on it, on its kin, or taken from its architecture.

    Args:
        gpu: the catalogue's id of the card; an unknown architecture gets the constants of Ampere.
        software: framework and version of the request.
    """
    hopper = compute_capability.startswith("9.")
    context, reason = _DATACENTER if compute_capability in ("8.0", "9.0", "10.0") else _CONSUMER
    prior = DeviceConstants(_HOPPER if hopper else _OTHERS, _CUBLAS, context, reason)
    if gpu is None:
        return prior
    return _measured(choose(gpu, compute_capability, software), prior)


def _measured(known: Chosen, prior: DeviceConstants) -> DeviceConstants:
    """Put what was measured in the place of a prior."""
    nearest = known.own or known.kin
    if nearest is None:
        return prior
    context, reason = nearest.constants.context, f"measured on {nearest.gpu}: {nearest.name}"
    if context is not None and nearest is known.kin:
        reason = f"{reason}, another card of the same architecture; taken {KIN - 1:.0%} wider, "
        reason += "a step that we chose and nothing measures"
        context = _stretched(context, KIN)
    workspace = nearest.constants.cublas_workspace
    return DeviceConstants(
        cublas_workspace=prior.cublas_workspace if workspace is None else workspace,
        cublas_source=prior.cublas_source,
        context=prior.context if context is None else context,
        context_source=prior.context_source
        if context is None
        else Assumption(f"CUDA context and loaded kernels {reason}"),
    )


def _stretched(around: Range, factor: float) -> Range:
    low = around.expected - round((around.expected - around.low) * factor)
    high = around.expected + round((around.high - around.expected) * factor)
    return Range(max(0, low), around.expected, high)


WIDER: Final = 0.25
"""How much a range grows with each choice that no measured run had, and with each doubling."""
UNMEASURED: Final = 0.25
"""The spread of a quantity that no record is about."""

_CHOSEN: Final = "which we chose and nothing measures"
WIDER_REASON: Final = Assumption(
    f"a range grows by {WIDER:.0%} with each choice that no measured run had and with each "
    f"doubling of a size beyond theirs: a step {_CHOSEN}"
)
KIN_REASON: Final = Assumption(
    f"ranges of another card of the same architecture are taken {KIN - 1:.0%} wider: a step "
    f"{_CHOSEN}"
)
UNMEASURED_REASON: Final = Assumption(
    f"a quantity without any record is taken to lie within {UNMEASURED:.0%}: a width {_CHOSEN}"
)


def _tail(stratum: Stratum, confidence: float) -> tuple[Assumption, ...]:
    """Return what is assumed of a confidence that so few rows do not give by themselves."""
    level, _ = stratum.level(confidence)
    if level <= stratum.supported:
        return ()
    return (
        Assumption(
            f"{stratum.quantity}: {stratum.rows} runs show what happens up to a confidence of "
            f"{stratum.supported:.1%}; up to {100 * level:g}% larger errors are taken to become "
            f"exponentially rarer, a course {_CHOSEN}"
        ),
    )


class Work(Struct, frozen=True):
    """The micro-batch of a run [tokens], and its length [tokens]."""

    tokens: int
    seq_len: int


class Part(Struct, frozen=True):
    """One calibration's word on a quantity, before the micro-batch is known.

    Args:
        assumed: what of the spread we chose.
    """

    stratum: Stratum
    spread: float
    steps: float
    outside: tuple[str, ...]
    origin: str
    assumed: tuple[Assumption, ...] = ()

    def at(self, work: Work) -> float:
        """Return the spread at one micro-batch and length; it never shrinks with either."""
        return self.spread * self.widening(work)

    def widening(self, work: Work) -> float:
        """Return the factor on the spread for what no measured run had."""
        return 1 + WIDER * (self.steps + self.stratum.beyond(work.tokens, work.seq_len))


class Spread(Struct, frozen=True):
    """How far a measurement may lie from the expected value; the widest of its parts holds."""

    quantity: Quantity
    parts: tuple[Part, ...]

    def at(self, work: Work) -> float:
        """Return the spread at one micro-batch and length."""
        return max((part.at(work) for part in self.parts), default=UNMEASURED)

    def around(self, expected: int, work: Work) -> Range:
        """Return the range in which a measurement lies with the confidence that was asked for."""
        factor = 1 + self.at(work)
        return Range(round(expected / factor), expected, round(expected * factor))

    def assumptions(self, work: Work) -> tuple[Assumption, ...]:
        """Return what of the range is no measurement but a choice of ours."""
        widest = self._widest(work)
        if widest is None:
            return (UNMEASURED_REASON,)
        steps = (WIDER_REASON,) if widest.widening(work) > 1 else ()
        return (*widest.assumed, *steps)

    def _widest(self, work: Work) -> Part | None:
        return max(self.parts, key=lambda part: part.at(work), default=None)

    def promise(self, work: Work) -> Promise:
        """Return what the range rests on, and how far the request lies outside of it."""
        widest = self._widest(work)
        if widest is None:
            reason = f"{self.quantity}: no record; taken to be within {UNMEASURED:.0%}"
            return Promise(self.quantity, UNMEASURED, 0, 0, (), 1.0, reason)
        beyond = widest.stratum.beyond(work.tokens, work.seq_len)
        longer = (f"{2**beyond:.1f} times more tokens",) if beyond else ()
        outside = (*widest.outside, *longer)
        spread, widening = widest.at(work), widest.widening(work)
        rows, groups = widest.stratum.rows, len(widest.stratum.groups)
        reason = f"{self.quantity}: within {spread:.1%}, from {rows} {widest.origin}"
        reason = f"{reason} in {groups} group{'s' if groups > 1 else ''}"
        if outside:
            reason = f"{reason}; {widening - 1:.0%} wider than measured, because none had "
            reason += ", ".join(outside)
        return Promise(self.quantity, spread, rows, groups, outside, widening, reason)


class Ranges(Struct, frozen=True):
    """How wide the range of each quantity is, for one recipe on one device.

    Args:
        calibration: the name of the file that the spreads come from.
        recoverable: the spread of what a run needs, where memory limits were swept; without it
            the allocated one is taken, and `OTHER_ORDER` on top.
    """

    calibration: str
    confidence: float
    constants: DeviceConstants
    allocated: Spread
    reserved: Spread
    device_used: Spread
    recoverable: Spread | None

    def of_reserved(self, replayed: Range, allocated: Range, work: Work) -> Range:
        """Return the range of `max_memory_reserved`, which is never below the allocated one's.

        Args:
            replayed: the least, the middle and the most that replays of the run gave [bytes].
        """
        low, found, high = (
            self.reserved.around(max(each, allocated.expected), work)
            for each in (replayed.low, replayed.expected, replayed.high)
        )
        found = Range(low.low, found.expected, high.high)
        return Range(
            max(found.low, min(allocated.low, found.expected)),
            found.expected,
            max(found.high, allocated.high),
        )

    def of_device_used(self, reserved: Range, managed: int, work: Work) -> Range:
        """Return what the driver shows as used by the process.

        Args:
            managed: CUDA managed memory [bytes], which may be on the device or evicted from it.
        """
        context = self.constants.context
        found = self.device_used.around(reserved.expected + context.expected, work)
        return Range(
            max(found.low, reserved.low + context.low),
            found.expected + managed,
            max(found.high, reserved.high + context.low) + managed,
        )

    def of_needed(
        self, allocated: int, pinned: int, work: Work, most: int = 0, *, unknown: bool = False
    ) -> Range:
        """Return the least device memory with which the run does not run out.

        Segments with nothing in them and managed memory give way under pressure, so they are not
        part of it.

        Args:
            allocated: the peak in whole blocks, each of the size that it would get from a fresh
                segment [bytes]; with less no order of requests is served.
            pinned: what the allocator could not give back of a run whose batches are all of one
                length [bytes].
            most: the same after batches of other lengths.
            unknown: whether the lengths are not known, so that others than those replayed count.
        """
        context = self.constants.context
        pinned = max(pinned, allocated)
        most = max(most, pinned)
        if self.recoverable is not None:
            found, highest = (
                self.recoverable.around(pinned, work),
                self.recoverable.around(most, work),
            )
            margin = OTHER_LENGTHS if unknown else 1.0
        else:
            found = self.allocated.around(allocated, work)
            highest = self.allocated.around(most, work)
            margin = OTHER_LENGTHS if unknown else OTHER_ORDER
        return Range(
            found.low + context.low,
            pinned + context.expected,
            round(highest.high * margin) + context.high,
        )

    def reasons(self, work: Work, *, unknown: bool = False) -> tuple[str, ...]:
        """Return what each range rests on, and what is assumed beside it.

        Args:
            unknown: whether the lengths of samples are not known.
        """
        promised = tuple(each.reason for each in self.promises(work).ranges)
        chosen = tuple(one.reason for each in self._spreads() for one in each.assumptions(work))
        needed = () if self.recoverable is not None else (NEEDED_REASON.reason,)
        lengths = (LENGTHS_REASON.reason,) if unknown else ()
        context = self.constants.context_source.reason
        return tuple(dict.fromkeys((*promised, *chosen, *needed, *lengths, context)))

    def promises(self, work: Work) -> Promises:
        """Return what each range rests on, as the result document holds it."""
        return Promises(
            self.calibration,
            self.confidence,
            tuple(each.promise(work) for each in self._spreads()),
        )

    def _spreads(self) -> tuple[Spread, ...]:
        spreads = (self.allocated, self.reserved, self.device_used, self.recoverable)
        return tuple(each for each in spreads if each is not None)


OTHER_ORDER: Final = 1.03
NEEDED_REASON: Final = Assumption(
    "segments with nothing in them are given back before a run fails; a replay of the allocator "
    "says how much is in the others, and 3 % are kept on top for another order of requests; no "
    "sweep of memory limits backs this yet"
)
OTHER_LENGTHS: Final = 1.10
"""Above what two replays need: of batches of one length, and of a shorter first one.

docs/orders.md has the recipes and orders that it was tried on.
"""
LENGTHS_REASON: Final = Assumption(
    "batches are taken to be of different lengths, as those of samples are that are not packed: a "
    "run whose first batch has two thirds of seq_len is replayed too, and 10 % are kept on top "
    "for lengths that are not; give sample_lengths, or packing, where they are known"
)


@lru_cache(maxsize=1024)
def ranges(traits: Traits, gpu: str | None, compute_capability: str, confidence: float) -> Ranges:
    """Return how wide the ranges are for a recipe on a card.

    Inside of what was measured on the very card its own residuals hold. Elsewhere the widest holds
    of what is known: the card's own, widened; its kin's, wider still; and what others published.
    """
    software = dict(traits.choices).get("software", "")
    known = choose(gpu, compute_capability, software)

    def spread(quantity: Quantity) -> Spread:
        return Spread(quantity, _parts(known, quantity, traits, confidence))

    recoverable = spread("needed")
    named = known.own or known.kin or known.published
    return Ranges(
        calibration=named.name if named is not None else "none",
        confidence=confidence,
        constants=device_constants(compute_capability, gpu, software),
        allocated=spread("allocated"),
        reserved=spread("reserved"),
        device_used=spread("device-used"),
        recoverable=recoverable if recoverable.parts else None,
    )


def _parts(
    known: Chosen, quantity: Quantity, traits: Traits, confidence: float
) -> tuple[Part, ...]:
    found = []
    for calibration, factor in ((known.own, 1.0), (known.kin, KIN), (known.published, 1.0)):
        stratum = calibration.stratum(quantity, traits.kind) if calibration is not None else None
        if calibration is None or stratum is None:
            continue
        outside = stratum.outside(traits)
        origin = f"{calibration.origin} runs"
        if calibration.gpu is not None:
            origin = f"{origin} on {calibration.gpu}"
        level = stratum.spread(confidence) * factor
        assumed = (*_tail(stratum, confidence), *((KIN_REASON,) if factor > 1 else ()))
        found.append(Part(stratum, level, outside.steps, outside.reasons, origin, assumed))
        if calibration is known.own and not outside.steps:
            break
    return tuple(found)


COMPILED: Final = 0.95
COMPILED_REASON: Final = Assumption(
    "a compiled step is taken to need at least 95 % of what the partitioner and the fusions of "
    "torch 2.13 leave, and at most what they leave or what the eager step needs, whichever is "
    "more: dynamo runs the eager step where it has compiled too many shapes, and what an "
    "autotuned or padded product takes is not known before it is tried on the card"
)
RECORDED: Final = Assumption(
    "reduce-overhead and max-autotune record CUDA graphs in a pool of their own: at most, all that "
    "the optimizer's step takes beside the gradients comes on top of the peak; what tuned kernels "
    "save or take is not known before they are tried on the card"
)


def compiled_range(compiled: Range, eager: Range) -> Range:
    """Return the range of a compiled run, whose high end is never below the eager run's."""
    low = min(compiled.low, round(compiled.expected * COMPILED))
    return Range(low, compiled.expected, max(compiled.high, eager.high))
