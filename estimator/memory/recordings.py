"""The passes of a run's steps as they are replayed: first step and later ones, micro-batches."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from msgspec import structs

from estimator.eager.tensor import Regime
from estimator.memory.caching_allocator import Call
from estimator.memory.hessian_pass import hessian_pass
from estimator.memory.loading import added, loading
from estimator.memory.loss import LOSSES
from estimator.memory.optimizer_log import OptimizerLog, optimizer_log
from estimator.memory.outside_loss import OutsideLoss
from estimator.memory.trace import Recording, record
from estimator.run import Run

Pass = tuple[Recording, ...]
# Far above the numbers of the tensors of a step.
_ANOTHER: Final = 1 << 60


class Recordings:
    """The passes of a run's steps by their regime, and what is before them; each is found once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._first: dict[Regime, tuple[Pass, ...]] = {}
        self._steady: dict[Regime, tuple[Pass, ...]] = {}

    @cached_property
    def loading(self) -> tuple[tuple[Call, ...], ...]:
        """What making the model asks for; between the parts the cache is emptied."""
        parts: list[list[Call]] = [[]]
        for serial, _, _, size in loading(self.run):
            if serial < 0:
                parts.append([])
            else:
                parts[-1].append((("loaded", serial), size))
        return tuple(tuple(part) for part in parts)

    @cached_property
    def added(self) -> tuple[Call, ...]:
        """What is there beside the model before the first step."""
        sizes = (size for _, size in added(self.run))
        return tuple((("added", number), size) for number, size in enumerate(sizes))

    @cached_property
    def update(self) -> OptimizerLog:
        """What the optimizer's step makes, the first one and the others."""
        return optimizer_log(self.run)

    def steady(self, regime: Regime) -> tuple[Pass, ...]:
        """Return the passes of any step but the first, each with the micro-batches that differ."""
        if regime not in self._steady:
            second = hessian_pass(self.run)
            runs = (self.run,) if second is None else (self.run, second)
            self._steady[regime] = tuple(_steady(each, regime) for each in runs)
        return self._steady[regime]

    def first(self, regime: Regime) -> tuple[Pass, ...]:
        """Return the passes of the first step, where some gradients are not there yet."""
        if regime not in self._first:
            one, *more = self.steady(regime)
            self._first[regime] = (_first_pass(self.run, regime) or one, *more)
        return self._first[regime]


def _steady(run: Run, regime: Regime) -> Pass:
    """Return the micro-batches of a pass: the first makes the gradients that the others add to."""
    later = record(run, regime)
    if not run.gathers or run.keeps_gradients:
        return (later,)
    return (_numbered(record(run, regime, makes_gradients=True), _ANOTHER), later)


def _first_pass(run: Run, regime: Regime) -> Pass | None:
    """Return the first step, where it makes gradients that stay; they have numbers of their own.

    Nor is there anything yet of what a loop's names keep from the step before.
    """
    stays = any(weight.keeps_gradient for _, weight, _ in run.spec.tensors())
    stays = stays or (run.gathers and run.keeps_gradients)
    if not stays and not isinstance(LOSSES[run.loss], OutsideLoss):
        return None
    found = record(run, regime, first_step=True, makes_gradients=run.gathers)
    later = (record(run, regime),) if run.micro_batches > 1 else ()
    return (_numbered(found, 2 * _ANOTHER), *later)


def _numbered(found: Recording, offset: int) -> Recording:
    """Return a recording whose tensors have other numbers."""
    log = tuple(
        each._replace(events=tuple((serial + offset, kind) for serial, kind in each.events))
        for each in found.log
    )
    first = found.first_product
    return structs.replace(found, log=log, first_product=None if first is None else first + offset)
