"""The highest readings of a device's meters, over the whole run and within each phase of a step."""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import astuple

from estimator.record import Meters, PhasePeak
from profiler import trace


class Counters(Protocol):
    """What a device counts."""

    def meters(self) -> Meters:
        """Return the highest values since the peaks were reset."""

    def reset_peaks(self) -> None:
        """Let the peaks start again from the present values."""


class Gauge:
    """Reads the meters at every change of phase and keeps the highest values.

    A phase's peak is at least what was in use when it began: that is how torch resets its peaks.
    What backward does of the loss is a part of `backward` here: it is not announced, and the dry
    run tells the two apart by autograd's numbers of the nodes.

    Args:
        counters: of the device.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._phases: dict[str, Meters] = {}
        self._phase: str | None = None
        self._pass = ""
        self.peak = Meters()
        self.steps = 0
        self.seconds: list[float] = []

    @property
    def phases(self) -> tuple[PhasePeak, ...]:
        """The highest values within each phase of the last step that was begun."""
        return tuple(PhasePeak(name, peak) for name, peak in self._phases.items())

    def phase(self, name: str) -> None:
        """Begin a phase, by the name that the workload gives it."""
        if name in (trace.BATCH, trace.ESTIMATE_HESSIAN):
            self._pass = "Hessian " if name == trace.ESTIMATE_HESSIAN else ""
        if name != trace.ESTIMATE_HESSIAN:
            self.enter(self._pass + (trace.FORWARD if name == trace.BATCH else name))

    def enter(self, name: str) -> None:
        """Begin a phase, by the name that it has in the record."""
        self.close()
        self._phase = name

    def begin_step(self) -> None:
        """Begin a step: the phases are those of the last one."""
        self.close()
        self._phases.clear()

    def end_step(self, seconds: float | None = None) -> None:
        """End a step that ran through.

        Args:
            seconds: how long it took; None where there is no time to measure.
        """
        self.close()
        self.steps += 1
        if seconds is not None:
            self.seconds.append(seconds)

    def close(self) -> None:
        """Read the meters for the present phase, if one has begun, and leave it."""
        read = self._counters.meters()
        self.peak = _higher(self.peak, read)
        if self._phase is not None:
            self._phases[self._phase] = _higher(self._phases.get(self._phase, Meters()), read)
        self._phase = None
        self._counters.reset_peaks()


def _higher(one: Meters, other: Meters) -> Meters:
    return Meters(*map(_max, astuple(one), astuple(other)))


def _max(one: int | None, other: int | None) -> int | None:
    return max((each for each in (one, other) if each is not None), default=None)
