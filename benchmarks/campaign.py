"""How many cases a campaign gets through in ten minutes: `python -m benchmarks.campaign`.

The loop of `profiler.turns` runs as it is, on a clock and processes that are modelled: a case first
needs so many seconds of a processor to import and build, then so many with the device. Processes
share the processors evenly. `--real` runs real processes instead, ten times as fast.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from estimator.record import Run, append
from profiler.matrices import Case
from profiler.results import Results, Stand
from profiler.turns import Limits, Planned, jobs_for, planned, processes, processors, run

BUDGET_SECONDS: Final = 600.0
BUILD_SECONDS: Final = 10.0
PROCESSORS: Final = (1, 2, 4, 16)
MEASURE_SECONDS: Final = (2.0, 4.0, 6.0, 8.0, 9.5)
_WHERE: Final = Stand("simulated", "model", None)
_FASTER: Final = 10
_CASES: Final = 320
_STEP_SECONDS: Final = 0.1


class Machine:
    """Processors and one device, on a clock of their own.

    Args:
        processors: shared evenly by the processes that work.
        build_seconds: of a processor, for each case.
        measure_seconds: with the device, for each case; a processor is busy meanwhile.
        out: the file for the records.
    """

    def __init__(
        self, processors: int, build_seconds: float, measure_seconds: float, out: Path
    ) -> None:
        self._processors = processors
        self._build, self._measure = build_seconds, measure_seconds
        self._time = 0.0
        self._children: list[_Modelled] = []
        self.out = out

    def now(self) -> float:
        """Return the model's time."""
        return self._time

    def sleep(self, seconds: float) -> None:
        """Let time pass, at least a tenth of a second, and the processes work."""
        seconds = max(seconds, _STEP_SECONDS)
        self._time += seconds
        working = [each for each in self._children if each.works]
        share = min(1.0, self._processors / max(1, len(working)))
        for each in working:
            each.work(seconds * share)

    def start(self, each: Planned) -> _Modelled:
        """Start the process of a case."""
        child = _Modelled(each, self._build, self._measure, self.out, self._children.remove)
        self._children.append(child)
        return child


class _Modelled:
    def __init__(
        self,
        each: Planned,
        build: float,
        measure: float,
        out: Path,
        gone: Callable[[_Modelled], None],
    ) -> None:
        self._each, self._build, self._measure, self._out, self._gone = (
            each, build, measure, out, gone,
        )  # fmt: skip
        self._turn = False

    @property
    def works(self) -> bool:
        return self._build > 0 or (self._turn and self._measure > 0)

    def work(self, seconds: float) -> None:
        if self._build > 0:
            self._build -= seconds
        else:
            self._measure -= seconds

    def poll(self) -> int | None:
        if self._build > 0 or self._measure > 0:
            return None
        found = Run(id=self._each.id, origin="simulated", group="", request={}, outcome="ok")
        append(self._out, found)
        self._gone(self)
        return 0

    def give_turn(self) -> None:
        self._turn = True

    def kill(self) -> None:
        self._gone(self)

    def last_words(self) -> str:
        return ""


def cases_in_budget(
    processors: int,
    measure_seconds: float,
    *,
    build_seconds: float = BUILD_SECONDS,
    jobs: int | None = None,
) -> int:
    """Return how many cases end within ten minutes on a modelled machine.

    Args:
        jobs: processes at a time; None is what a campaign takes on such a machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        machine = Machine(processors, build_seconds, measure_seconds, out)
        limits = Limits(BUDGET_SECONDS, jobs=jobs or jobs_for(processors))
        report = run(_many(), Results(out, _WHERE), limits, machine.start, clock=machine)
    return report.count("ok")


def _many() -> tuple[Planned, ...]:
    cases = [
        ("model", Case(str(n), "", request={"model": "x", "seq_len": n})) for n in range(_CASES)
    ]
    return planned(cases, _WHERE, {})


# Burns a processor, waits for its turn, holds the device, writes its record.
_CHILD: Final = """
import fcntl, json, sys, time
build, measure = map(float, sys.argv[1:3])
value = dict(zip(sys.argv[3::2], sys.argv[4::2]))
while time.process_time() < build: pass
with open(value["--lock"], "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    time.sleep(measure)
    line = {"schema": "measurement/v1", "record": "run", "id": value["--id"], "group": "",
            "origin": "simulated", "request": {}, "outcome": "ok"}
    open(value["--append"], "a").write(json.dumps(line) + "\\n")
"""


def real_cases_in_budget(measure_seconds: float) -> int:
    """Return the same for real processes on this machine, everything ten times as fast."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        times = (BUILD_SECONDS / _FASTER, measure_seconds / _FASTER)
        command = (sys.executable, "-S", "-E", "-c", _CHILD, *map(str, times))
        limits = Limits(BUDGET_SECONDS / _FASTER, jobs=jobs_for(processors()))
        with processes(_WHERE, out, measure=command) as start:
            # The request's file is the last argument, without a flag, so it has one here.
            report = run(_probes(), Results(out, _WHERE), limits, start)
    return report.count("ok")


def _probes() -> tuple[Planned, ...]:
    cases = [("model", Case(str(n), "", probe="none", arguments={"n": n})) for n in range(_CASES)]
    return planned(cases, _WHERE, {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how many cases end, by processors and by seconds with the device."""
    parser = argparse.ArgumentParser(description="Cases that a campaign gets through in 10 minutes")
    parser.add_argument("--real", type=float, metavar="SECONDS", help="with the device, for real")
    asked = parser.parse_args(arguments)
    if asked.real is not None:
        model = cases_in_budget(processors(), asked.real)
        print(f"{real_cases_in_budget(asked.real)} cases ended, {model} in the model")
        return
    print(f"cases in 10 minutes; {BUILD_SECONDS:g} s of a processor to import and build each")
    print(
        "processors  jobs" + "".join(f"{each:>8g} s" for each in MEASURE_SECONDS) + "   one by one"
    )
    for count in PROCESSORS:
        found = [cases_in_budget(count, each) for each in MEASURE_SECONDS]
        alone = cases_in_budget(count, 4.0, jobs=1)
        cells = "".join(f"{each:>10}" for each in found)
        print(f"{count:>10}{jobs_for(count):>6}{cells}{alone:>9} (4 s)")


if __name__ == "__main__":
    main()
