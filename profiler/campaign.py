"""Many cases in fresh processes, within a time budget: `python -m profiler.campaign MATRIX`.

Records are appended to one file of JSON lines as they come. A case whose record is there is not
run again, so a campaign that was cut off goes on where it was. It needs Python, torch,
transformers, accelerate and what the cases need; none of click, rich, PyYAML or msgspec.
"""

from __future__ import annotations

from profiler.plain_structs import install_if_missing

install_if_missing()

import argparse  # noqa: E402 - estimator is imported behind the line above
import contextlib  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Final, NoReturn  # noqa: E402

from estimator.errors import CannotEstimateError, EstimatorError  # noqa: E402
from estimator.units import GiB  # noqa: E402
from profiler.matrices import MATRICES, cases, missing  # noqa: E402
from profiler.results import Results, Stand, checked_output, stand  # noqa: E402
from profiler.turns import (  # noqa: E402
    BUDGET_SECONDS,
    CASE_SECONDS,
    MEASURE,
    STEPS,
    Ended,
    Limits,
    Planned,
    Report,
    command,
    jobs_for,
    planned,
    processes,
    processors,
    run,
)

INTERRUPTED: Final = 130
DEVICES: Final = ("cuda", "simulated")
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600}
_OTHERS_NOTICED: Final = GiB


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Args:
        matrices: names of `MATRICES`, run one after the other.
        out: the file of records; None is the one of this device and software.
        jobs: processes at a time; None goes by the number of processors.
        snapshots: a folder for torch's history of the allocations of each request.
        retry_errors: run the cases again that ended with an error.
        listed: print the cases and run nothing.
        dry: print what would be run and run nothing.
        measure: the command of one case.
    """

    matrices: tuple[str, ...]
    budget_seconds: float = BUDGET_SECONDS
    out: Path | None = None
    device: str = "cuda"
    gpu: str | None = None
    jobs: int | None = None
    case_seconds: float = CASE_SECONDS
    steps: int = STEPS
    snapshots: Path | None = None
    retry_errors: bool = False
    listed: bool = False
    dry: bool = False
    measure: tuple[str, ...] = MEASURE


def seconds(text: str) -> float:
    """Return a length of time: `90`, `90s`, `10m` or `1.5h`.

    Raises:
        ValueError: it is none, or not above 0.

    Example:
        >>> seconds("10m")
        600.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no length of time above 0; write 90s, 10m or 1h")
    return float(found[1]) * _UNITS[found[2]]


class Campaign:
    """The cases of some matrices on one device, and the file for their records.

    Raises:
        EstimatorError: there is no device, or no place for the records.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.where: Stand = stand(options.device, options.gpu)
        self.out = checked_output(options.out, self.where)
        self.results = Results(self.out, self.where)

    def planned(self) -> tuple[Planned, ...]:
        """Return the cases in their order, with what the file has of them."""
        chosen = [
            (matrix, case)
            for matrix in self.options.matrices
            for case in cases(matrix, self.where.gpu_id)
        ]
        return planned(chosen, self.where, self.results.outcomes())

    def waits(self, each: Planned) -> bool:
        """Whether a case is to be run."""
        return each.done is None or (self.options.retry_errors and each.done == "error")

    def carry_out(self, begun: Callable[[int], None], ended: Ended) -> Report:
        """Run what waits, and return what came of it.

        Args:
            begun: told how many cases wait, before the first is run.
            ended: told of each case that has ended.
        """
        options = self.options
        limits = Limits(
            options.budget_seconds, options.case_seconds, options.jobs or jobs_for(processors())
        )
        if options.snapshots is not None:
            options.snapshots.mkdir(parents=True, exist_ok=True)
        with self.results.held(), _interruptible():
            waiting = [each for each in self.planned() if self.waits(each)]
            self.results.forget_errors({each.id for each in waiting})
            begun(len(waiting))
            with processes(
                self.where,
                self.out,
                steps=options.steps,
                snapshots=options.snapshots,
                measure=options.measure,
            ) as start:
                return run(waiting, self.results, limits, start, ended)

    def listing(self) -> str:
        """Return the cases as lines: number, id, what is known of it, what it is and why."""
        rows = []
        for number, each in enumerate(self.planned(), 1):
            absent = missing(each.case)
            state = each.done or (f"needs {', '.join(absent)}" if absent else "waits")
            rows.append(f"{number:4} {each.id} {state:12} {each.case.name}  ({each.case.why})")
        return "\n".join(rows)

    def commands(self) -> str:
        """Return the command line of every case that would be run, in order."""
        options = self.options
        lines = []
        for each in self.planned():
            if self.waits(each):
                line = command(
                    each,
                    self.where,
                    self.out,
                    steps=options.steps,
                    snapshots=options.snapshots,
                    measure=options.measure,
                )
                request = [] if each.case.request is None else ["REQUEST.json"]
                lines.append(shlex.join([*line, *request]))
        return "\n".join(lines)

    def remarks(self) -> tuple[str, ...]:
        """Return what a user should know before the first case."""
        others = self.where.used_by_others_bytes
        if others <= _OTHERS_NOTICED:
            return ()
        return (
            f"other processes hold {others / GiB:.1f} GiB of {self.where.gpu}; what they take or "
            "free meanwhile is counted as the cases' own device memory",
        )


def summary(report: Report, out: Path) -> str:
    """Return what came of a campaign in one or two lines."""
    counts = ", ".join(
        f"{report.count(outcome)} {words}"
        for outcome, words in (
            ("ok", "ran through"),
            ("out_of_memory", "ran out of memory"),
            ("error", "ended with an error"),
        )
        if report.count(outcome)
    )
    text = f"{len(report.outcomes)} of {report.total} cases: {counts or 'none ended'}; {out}"
    return f"{text}\n{report.stopped}" if report.stopped else text


def exit_code(report: Report) -> int:
    """Return 0, or 3 where cases ended and not one of them could be measured."""
    ended = len(report.outcomes)
    return CannotEstimateError.exit_code if ended and report.count("error") == ended else 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end a campaign as Ctrl-C does: its processes with it, and whole lines."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line, as every command of this project does."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _length(text: str) -> float:
    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


HELP: Final = {
    "--budget": "for all cases together: 90s, 10m or 1h",
    "--out": "records, a line each; by default the file of this GPU and software",
    "--device": "a GPU, or a simulated one to try this without",
    "--gpu": "the card to simulate",
    "--jobs": "processes at a time; one of them measures, the others build",
    "--case-limit": "for one case, from its turn on",
    "--steps": "optimizer steps of each request",
    "--snapshots": "a folder for torch's histories of allocations",
    "--retry-errors": "run cases again that ended with an error",
    "--list": "print the cases, their order and why; run nothing",
    "--dry": "print the commands that would be run; run nothing",
}
"""What the flags do, for both doors."""


def _steps(text: str) -> int:
    if _count(text) < STEPS:
        raise argparse.ArgumentTypeError(
            f"{text} is fewer than {STEPS}; the first step has no optimizer states before it"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="profiler.campaign",
        description="Measure the cases of a matrix in fresh processes, as many as the time allows.",
        epilog="Exit codes: 0 done, or the time is up; 2 usage error; 3 nothing could be measured.",
        allow_abbrev=False,
    )
    parser.add_argument("matrices", nargs="+", choices=MATRICES, metavar="MATRIX",
                        help=", ".join(MATRICES))  # fmt: skip
    parser.add_argument("--budget", type=_length, default=BUDGET_SECONDS, metavar="TIME",
                        help=HELP["--budget"])  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help=HELP["--out"])
    parser.add_argument("--device", choices=DEVICES, default="cuda", help=HELP["--device"])
    parser.add_argument("--gpu", metavar="ID", help=HELP["--gpu"])
    parser.add_argument("--jobs", type=_count, metavar="N", help=HELP["--jobs"])
    parser.add_argument("--case-limit", type=_length, default=CASE_SECONDS, metavar="TIME",
                        help=HELP["--case-limit"])  # fmt: skip
    parser.add_argument("--steps", type=_steps, default=STEPS, help=HELP["--steps"])
    parser.add_argument("--snapshots", type=Path, metavar="FOLDER", help=HELP["--snapshots"])
    for flag in ("--retry-errors", "--list", "--dry"):
        parser.add_argument(flag, action="store_true", help=HELP[flag])
    return parser


def main(arguments: Sequence[str] | None = None, measure: Sequence[str] = MEASURE) -> int:
    """Run the module's command; return its exit code.

    Args:
        measure: the command of one case.
    """
    asked = _parser().parse_args(arguments)
    options = Options(
        matrices=tuple(asked.matrices),
        budget_seconds=asked.budget,
        out=asked.out,
        device=asked.device,
        gpu=asked.gpu,
        jobs=asked.jobs,
        case_seconds=asked.case_limit,
        steps=asked.steps,
        snapshots=asked.snapshots,
        retry_errors=asked.retry_errors,
        listed=asked.list,
        dry=asked.dry,
        measure=tuple(measure),
    )
    try:
        return _carry_out(Campaign(options))
    except EstimatorError as error:
        print(f"profiler.campaign: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("profiler.campaign: interrupted; run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the list has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _carry_out(campaign: Campaign) -> int:
    if campaign.options.listed or campaign.options.dry:
        print(campaign.listing() if campaign.options.listed else campaign.commands(), flush=True)
        return 0
    for remark in campaign.remarks():
        print(f"profiler.campaign: {remark}", file=sys.stderr)
    report = campaign.carry_out(told_begun, told_ended)
    print(summary(report, campaign.out), file=sys.stderr)
    return exit_code(report)


def told_begun(number: int) -> None:
    """Say on standard error how many cases wait."""
    print(f"{number} cases wait", file=sys.stderr, flush=True)


def told_ended(each: Planned, outcome: str, report: Report) -> None:
    """Say on standard error how a case ended."""
    place = f"{len(report.outcomes)}/{report.total}"
    print(f"{place:>9} {outcome:14} {each.case.name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
