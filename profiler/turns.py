"""The turns that cases take on a device: each in a fresh process, others building meanwhile.

The loop knows nothing of what a case is. It starts processes ahead of their turn, lets the oldest
use the device, takes its record, and ends what hangs; what ends without a record gets one that says
why. Nothing is recorded of a case that the end of the budget cuts off.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from profiler.children import REFUSED, Child, Process, exit_text
from profiler.matrices import Case
from profiler.results import Results, Stand, whole

MEASURE: Final = (sys.executable, "-m", "profiler.measure")
BUDGET_SECONDS: Final = 600.0
CASE_SECONDS: Final = 90.0
STEPS: Final = 3
SAME_CRASHES: Final = 5
"""After so many crashes in a row for one reason it is the machine, not the case."""

_TICK_SECONDS: Final = 0.02
_MOST_JOBS: Final = 6


@dataclass(frozen=True, slots=True)
class Planned:
    """One case of a campaign, with the id of its record.

    Args:
        group: the matrix that it is of.
        done: how its record in the file ended; None where it has none.
    """

    case: Case
    group: str
    id: str
    done: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """When a campaign stops.

    Args:
        budget_seconds: for all cases together; those that run then are ended without a record.
        case_seconds: for one case from its turn on.
        jobs: processes at a time; one measures, the others import and build.
    """

    budget_seconds: float = BUDGET_SECONDS
    case_seconds: float = CASE_SECONDS
    jobs: int = 2


@dataclass(slots=True)
class Report:
    """What has come of a campaign so far.

    Args:
        outcomes: of the cases that ended, by id.
        stopped: why it ended before its last case; None where it did not.
    """

    total: int
    outcomes: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None

    def count(self, outcome: str) -> int:
        """Return how many cases ended so."""
        return sum(each == outcome for each in self.outcomes.values())


class Clock(Protocol):
    """The time, so that a test can have its own."""

    def now(self) -> float:
        """Return seconds."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class Watch:
    """The machine's own clock."""

    def now(self) -> float:
        """Return seconds that only grow."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


Start = Callable[[Planned], Child]
Ended = Callable[[Planned, str, Report], None]


@dataclass(slots=True)
class _Running:
    planned: Planned
    child: Child
    turn_at: float | None = None


def run(
    waiting: Sequence[Planned],
    results: Results,
    limits: Limits,
    start: Start,
    ended: Ended = lambda *_: None,
    clock: Clock | None = None,
) -> Report:
    """Run cases in their order and return what came of them.

    Args:
        start: starts the process of a case, which waits for its turn before it uses the device.
        ended: called when a case has ended, with its outcome.
    """
    report = Report(len(waiting))
    campaign = _Campaign(results, limits, start, ended, clock or Watch(), report)
    with _told_to_stop() as told:
        try:
            campaign.work_off(deque(waiting), told)
        finally:
            campaign.end_all()
    return report


@contextlib.contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Keep Ctrl-C and SIGTERM until they are asked for, so that neither cuts a step in two.

    An exception out of a signal may come between the start of a process and its place in the list,
    or while a file is closed; then a process is left over, or the end fails on its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    told: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: told.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Campaign:
    """The loop: start ahead, give turns, collect, and stop."""

    def __init__(
        self,
        results: Results,
        limits: Limits,
        start: Start,
        ended: Ended,
        clock: Clock,
        report: Report,
    ) -> None:
        self._results = results
        self._limits = limits
        self._start = start
        self._ended = ended
        self._clock = clock
        self._report = report
        self._running: list[_Running] = []
        self._crashes: list[str] = []

    def work_off(self, waiting: deque[Planned], told_to_stop: Callable[[], bool]) -> None:
        """Run until nothing waits, the budget is spent or the machine is at fault.

        Raises:
            KeyboardInterrupt: somebody wants it to stop.
        """
        deadline = self._clock.now() + self._limits.budget_seconds
        while waiting or self._running:
            if told_to_stop():
                raise KeyboardInterrupt
            self._collect()
            if len(self._crashes) >= SAME_CRASHES:
                self._report.stopped = (
                    f"{len(self._crashes)} cases in a row ended with {self._crashes[-1]!r}; mend "
                    "that, and run again with --retry-errors"
                )
                return
            if self._clock.now() >= deadline:
                if waiting or self._running:
                    self._report.stopped = "the time is up; run the same command to go on"
                return
            while waiting and len(self._running) < self._limits.jobs:
                planned = waiting.popleft()
                self._running.append(_Running(planned, self._start(planned)))
            self._give_turn()
            if self._running:
                self._clock.sleep(_TICK_SECONDS)

    def end_all(self) -> None:
        """End every process that still runs; what it has not recorded is run another time."""
        for each in self._running:
            each.child.kill()
        self._running.clear()

    def _give_turn(self) -> None:
        """Let the oldest process use the device, if no other does."""
        if self._running and all(each.turn_at is None for each in self._running):
            self._running[0].turn_at = self._clock.now()
            self._running[0].child.give_turn()

    def _collect(self) -> None:
        for each in tuple(self._running):
            code = each.child.poll()
            if code is not None:
                self._finish(each, code)
            elif self._is_late(each):
                each.child.kill()
                self._finish(each, None)

    def _is_late(self, each: _Running) -> bool:
        allowed = self._limits.case_seconds
        return each.turn_at is not None and self._clock.now() - each.turn_at > allowed

    def _finish(self, each: _Running, code: int | None) -> None:
        """Take a case's record, or write one that says why there is none."""
        self._running.remove(each)
        planned = each.planned
        if each.turn_at is not None:
            self._results.mend()
        outcome = self._results.outcome(planned.id)
        crashed = ""
        if outcome is None:
            crashed = self._reason(each, code)
            self._results.add_error(planned.case, planned.group, crashed)
            outcome = "error"
        if crashed and code not in REFUSED:
            same = self._crashes and self._crashes[-1] == crashed
            self._crashes = [*self._crashes, crashed] if same else [crashed]
        elif not crashed:
            self._crashes = []
        self._report.outcomes[planned.id] = outcome
        self._ended(planned, outcome, self._report)

    def _reason(self, each: _Running, code: int | None) -> str:
        words = each.child.last_words()
        if code in REFUSED:
            return f"refused: {words.removeprefix('profiler.measure: ')}"
        if code is None:
            how = f"killed after {self._limits.case_seconds:.0f} s"
        elif code == 0:
            how = "the process ended without a record"
        else:
            how = exit_text(code)
        return f"{how}: {words}" if words else how


def planned(
    chosen: Sequence[tuple[str, Case]], where: Stand, done: dict[str, str]
) -> tuple[Planned, ...]:
    """Return the cases of a campaign in their order, each once.

    Args:
        chosen: the matrix of each case, and the case.
        done: how the records of the file ended, by id.
    """
    found: dict[str, Planned] = {}
    for group, case in chosen:
        key = where.identity(case)
        found.setdefault(key, Planned(case, group, key, done.get(key)))
    return tuple(found.values())


def command(
    each: Planned,
    where: Stand,
    out: Path,
    *,
    steps: int = STEPS,
    snapshots: Path | None = None,
    measure: Sequence[str] = MEASURE,
) -> list[str]:
    """Return the command line of a case, but for its lock and the file of its request."""
    case = each.case
    line = [*measure]
    if case.probe is not None:
        line += ["--probe", case.probe, "--arguments", json.dumps(dict(case.arguments))]
    line += ["--append", str(out), "--group", each.group, "--id", each.id]
    line += ["--device", where.device]
    if where.device == "simulated" and where.gpu_id is not None:
        line += ["--gpu", where.gpu_id]
    if case.limit_bytes is not None:
        line += ["--memory-limit", str(case.limit_bytes)]
    if case.probe is None:
        line += ["--steps", str(steps)]
        if snapshots is not None:
            line += ["--snapshot", str(snapshots / f"{each.id}.pickle.gz")]
    return line


@contextlib.contextmanager
def processes(
    where: Stand,
    out: Path,
    *,
    steps: int = STEPS,
    snapshots: Path | None = None,
    measure: Sequence[str] = MEASURE,
) -> Iterator[Start]:
    """Yield what starts the processes of cases; their files are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        folder = Path(name)

        def start(each: Planned) -> Process:
            line = command(each, where, out, steps=steps, snapshots=snapshots, measure=measure)
            if each.case.request is not None:
                request = folder / f"{each.id}.json"
                request.write_text(json.dumps(whole(each.case, where)), encoding="utf-8")
                line.append(str(request))
            return Process(line, folder, each.id)

        yield start


def jobs_for(processors: int) -> int:
    """Return how many processes may run on a machine: one that measures, and some ahead.

    Example:
        >>> jobs_for(2), jobs_for(16)
        (3, 6)
    """
    return min(_MOST_JOBS, processors + 1)


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
