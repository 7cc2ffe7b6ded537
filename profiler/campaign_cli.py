"""The command `estimate campaign`: `python -m profiler.campaign` with a progress bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from estimator.flags import GroupedHelp
from profiler.campaign import (
    DEVICES,
    HELP,
    Campaign,
    Options,
    exit_code,
    seconds,
    summary,
    told_begun,
    told_ended,
)
from profiler.matrices import MATRICES
from profiler.turns import BUDGET_SECONDS, CASE_SECONDS, STEPS, Ended, Planned, Report


class _Time(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    name = "TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read `90s`, `10m` or `1h`; a number is seconds."""
        try:
            return value if isinstance(value, float) else seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_COUNT = click.IntRange(min=1)
_STEPS = click.IntRange(min=STEPS)


@click.command(
    cls=GroupedHelp, name="campaign", short_help="Measure many requests, each in a fresh process."
)
@click.argument(
    "matrices", nargs=-1, required=True, type=click.Choice(list(MATRICES)), metavar="MATRIX..."
)
@click.option("--budget", type=_Time(), default=BUDGET_SECONDS, help=HELP["--budget"])
@click.option("--out", type=_FILE, help=HELP["--out"])
@click.option("--device", type=click.Choice(DEVICES), default="cuda", help=HELP["--device"])
@click.option("--gpu", metavar="ID", help=HELP["--gpu"])
@click.option("--jobs", type=_COUNT, help=HELP["--jobs"])
@click.option("--case-limit", type=_Time(), default=CASE_SECONDS, help=HELP["--case-limit"])
@click.option("--steps", type=_STEPS, default=STEPS, help=HELP["--steps"])
@click.option("--snapshots", type=_FOLDER, help=HELP["--snapshots"])
@click.option("--retry-errors", is_flag=True, help=HELP["--retry-errors"])
@click.option("--list", "listed", is_flag=True, help=HELP["--list"])
@click.option("--dry", is_flag=True, help=HELP["--dry"])
def campaign(*, budget: float, case_limit: float, **asked: Any) -> int:
    """Measure many requests in fresh processes, as many as the time allows.

    MATRICES are tables of cases: constants, validation, out-of-memory. Records are appended to one
    file; a case whose record is there is not run again.

    \b
    estimate campaign constants validation --budget 10m
    estimate campaign validation --list
    """
    options = Options(budget_seconds=budget, case_seconds=case_limit, **asked)
    return carry_out(Campaign(options))


def carry_out(asked: Campaign) -> int:
    """Run a campaign and tell of it on standard error; return the exit code."""
    if asked.options.listed or asked.options.dry:
        click.echo(asked.listing() if asked.options.listed else asked.commands())
        return 0
    for remark in asked.remarks():
        click.echo(remark, err=True)
    with _bar(asked.options.budget_seconds) as (begun, ended):
        report = asked.carry_out(begun, ended)
    click.echo(summary(report, asked.out), err=True)
    return exit_code(report)


@contextlib.contextmanager
def _bar(budget_seconds: float) -> Iterator[tuple[Any, Ended]]:
    """Show how many cases are done; where there is no terminal, a line for each.

    It is drawn when a case ends, not by a thread: processes are started from this one.
    """
    from rich.console import Console
    from rich.progress import Progress

    console, since = Console(stderr=True), time.monotonic()
    if not sys.stderr.isatty():
        yield told_begun, told_ended
        return
    with Progress(console=console, auto_refresh=False) as bar:
        task = bar.add_task("importing and building", total=None)

        def begun(number: int) -> None:
            bar.update(task, total=number, refresh=True)

        def ended(each: Planned, outcome: str, report: Report) -> None:
            left = max(0, round(budget_seconds - (time.monotonic() - since)))
            if outcome != "ok":
                bar.console.print(f"{outcome}: {each.case.name}", markup=False, highlight=False)
            text = f"{each.case.name}, {left} s left"
            bar.update(task, completed=len(report.outcomes), description=text, refresh=True)

        yield begun, ended
