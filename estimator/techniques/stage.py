"""The fixed order in which techniques rewrite a run; a technique reads what earlier ones left."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from estimator.run import Run


class Stage(IntEnum):
    """When a technique applies; the order never comes from the user."""

    ADAPT = 1
    STORE = 2
    KERNEL = 3
    HEAD = 4
    TRAIN = 5
    CHECKPOINT = 6
    COMPILE = 7


class Technique(Protocol):
    """One rewrite of a run."""

    @property
    def stage(self) -> Stage:
        """Return when the technique applies."""
        ...

    def apply(self, run: Run) -> Run:
        """Return the run with the technique in it."""
        ...


def apply_all(techniques: tuple[Technique, ...], run: Run) -> Run:
    """Apply techniques in the order of their stages."""
    for technique in sorted(techniques, key=lambda each: each.stage):
        run = technique.apply(run)
    return run
