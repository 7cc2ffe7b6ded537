"""What torch's counters do not show: device constants and the spread of predictions.

Until measurements exist these are priors from upstream sources and published figures; each is an
assumption that the result names.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from estimator.result import Range
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


def device_constants(compute_capability: str) -> DeviceConstants:
    """Return the constants of an architecture; an unknown one gets those of Ampere."""
    hopper = compute_capability.startswith("9.")
    context, reason = _DATACENTER if compute_capability in ("8.0", "9.0", "10.0") else _CONSUMER
    return DeviceConstants(_HOPPER if hopper else _OTHERS, _CUBLAS, context, reason)


class Spread(Struct, frozen=True):
    """How far a measurement may lie from the expected value, as factors."""

    low: float
    expected: float
    high: float
    reason: Assumption


ALLOCATED: Final = Spread(
    0.99, 1.0, 1.02,
    Assumption(
        "allocated bytes are taken to lie within -1 % and +2 % of the formula; "
        "no measurement on a GPU backs this yet"
    ),
)  # fmt: skip
RESERVED: Final = Spread(
    0.97, 1.0, 1.08,
    Assumption(
        "reserved bytes come from replaying the step through a model of the caching allocator, and "
        "are taken to lie within -3 % and +8 % of it; no measurement on a GPU backs this yet"
    ),
)  # fmt: skip
NEEDED: Final = Spread(
    1.0, 1.0, 1.03,
    Assumption(
        "cached blocks are given back before a run fails; what cannot be given back is taken to "
        "be 3 % of the allocated peak at most; no measurement on a GPU backs this yet"
    ),
)  # fmt: skip


COMPILED: Final = Spread(
    0.95, 1.0, 1.0,
    Assumption(
        "a compiled step is taken to need at least 95 % of what the partitioner and the fusions of "
        "torch 2.13 leave, and at most what they leave or what the eager step needs, whichever is "
        "more: dynamo runs the eager step where it has compiled too many shapes, and what an "
        "autotuned or padded product takes is not known before it is tried on the card"
    ),
)  # fmt: skip


RECORDED: Final = Assumption(
    "reduce-overhead and max-autotune record CUDA graphs in a pool of their own: at most, all that "
    "the optimizer's step takes beside the gradients comes on top of the peak; what tuned kernels "
    "save or take is not known before they are tried on the card"
)


def compiled_range(compiled: Range, eager: Range) -> Range:
    """Return the range of a compiled run, whose high end is never below the eager run's."""
    low = min(compiled.low, round(compiled.expected * COMPILED.low))
    return Range(low, compiled.expected, max(compiled.high, eager.high))


def allocated_range(expected: int) -> Range:
    """Return the range of `max_memory_allocated` around its expected value."""
    return _around(expected, ALLOCATED)


def reserved_range(replayed: int) -> Range:
    """Return the range of `max_memory_reserved` around what the replay gave."""
    return _around(replayed, RESERVED)


def _around(expected: int, spread: Spread) -> Range:
    return Range(round(expected * spread.low), expected, round(expected * spread.high))


def device_used_range(reserved: Range, constants: DeviceConstants, managed: int) -> Range:
    """Return what the driver shows as used by the process.

    Args:
        managed: CUDA managed memory [bytes], which may be on the device or evicted from it.
    """
    context = constants.context
    return Range(
        reserved.low + context.low,
        reserved.expected + context.expected + managed,
        reserved.high + context.high + managed,
    )


def needed_range(allocated: int, constants: DeviceConstants) -> Range:
    """Return the least device memory with which the run does not run out.

    Cached blocks and managed memory give way under pressure, so they are not part of it.

    Args:
        allocated: the peak in whole blocks, each of the size that it would get from a fresh
            segment [bytes].
    """
    context = constants.context
    spread = _around(allocated, ALLOCATED)
    return Range(
        round(spread.low * NEEDED.low) + context.low,
        round(spread.expected * NEEDED.expected) + context.expected,
        round(spread.high * NEEDED.high) + context.high,
    )
