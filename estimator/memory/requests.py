"""Every request for memory of a run, in order: what asks, at which moment, and what is there then.

An out-of-memory message names a size and what was allocated; here both are looked up.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple

from estimator.eager.size import Polynomial
from estimator.eager.tensor import Regime
from estimator.memory.caching_allocator import round_size
from estimator.memory.clipping import clipping_temporaries
from estimator.memory.loading import LOADING, added, gradients_there, loading
from estimator.memory.standing import (
    IMPORTANCE,
    importance_sizes,
    kept_states,
    step_temporaries,
    tensors_with_states,
)
from estimator.memory.trace import Recording, record
from estimator.run import Run

Turn = Literal["load", "first step", "later steps"]


class Request(NamedTuple):
    """One request of a tensor.

    Args:
        turn: before training, in the first step, which has no optimizer states yet, or later.
        moment: the moment of the step.
        name: the tensor.
        size_bytes: what it asks for.
        before_bytes: blocks that are handed out when it asks.
    """

    turn: Turn
    moment: str
    name: str
    size_bytes: int
    before_bytes: int


def requests(run: Run, regime: Regime, at: Polynomial, workspaces: int) -> Iterator[Request]:
    """Yield what a run asks the allocator for until the end of its second step.

    Args:
        at: powers of the micro-batch and length.
        workspaces: bytes that libraries hold beside the tensors.
    """
    recording = record(run, regime)
    total = workspaces
    blocks: dict[int, int] = {}
    # No library has its workspaces before it multiplies.
    for serial, name, _, size in loading(run):
        if size is None:
            total -= blocks.pop(serial, 0)
            continue
        yield Request("load", LOADING, name, size, total - workspaces)
        blocks[serial] = _block(size)
        total += blocks[serial]
    for name, size in (*added(run), *gradients_there(run)):
        yield Request("load", LOADING, name, size, total - workspaces)
        total += _block(size)
    turns: tuple[Turn, ...] = ("first step", "later steps")
    for turn in turns:
        left = yield from _step(turn, recording, at, total)
        yield from _temporaries(
            turn, "gradient clipping", "norms of gradients", clipping_temporaries(run), left
        )
        if turn == "first step":
            for name, size in _first_states(run):
                yield Request(turn, "optimizer step", name, size, left)
                left += _block(size)
                total += _block(size)
        name = f"{run.optimizer.name} {run.optimizer.implementation}, temporaries of the step"
        yield from _temporaries(turn, "optimizer step", name, step_temporaries(run), left)


def _step(
    turn: Turn, recording: Recording, at: Polynomial, total: int
) -> Generator[Request, None, int]:
    """Yield the requests of forward and backward, and return what is there after them."""
    sizes = [kind.size[0] * at[kind.size[1]] for kind in recording.kinds]
    blocks = [_block(size) for size in sizes]
    kinds: dict[int, int] = {}
    for section in recording.log:
        site = recording.sites[section.site]
        moment = f"loss {section.phase}" if site == "loss" else f"{section.phase}: {site}"
        for serial, kind in section.events:
            if kind is None:
                total -= blocks[kinds.pop(serial)]
                continue
            yield Request(turn, moment, recording.kinds[kind].name, sizes[kind], total)
            kinds[serial] = kind
            total += blocks[kind]
    return total


def _temporaries(
    turn: Turn, moment: str, name: str, sizes: tuple[int, ...], total: int
) -> Iterator[Request]:
    for size in sizes:
        yield Request(turn, moment, name, size, total)
        total += _block(size)


def _block(size: int) -> int:
    return round_size(size) if size else 0


def _first_states(run: Run) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the optimizer's states, tensor by tensor, managed ones left out."""
    kept = kept_states(run)
    for each in tensors_with_states(run):
        for _ in range(each.count):
            yield from (
                (f"{each.name}.{state.name}", state.bytes(each))
                for state in kept
                if not state.managed(each)
            )
    for name, size, count in importance_sizes(run):
        yield from ((f"{name}.{score}", size) for _ in range(count) for score in IMPORTANCE)
