"""The commands `estimate dry-run` and `estimate compare-engines`.

Standard output carries the answer; progress and remarks go to standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from estimator.commands import exit_code, request_from_flags
from estimator.flags import GroupedHelp, request_options

if TYPE_CHECKING:
    from estimator.request import EstimateRequest
    from estimator.result import Result
    from profiler.comparison import Comparison, Difference
    from profiler.engine import Progress

_ROWS_SHOWN: Final = 20

_REQUEST_FILE: Final = click.Option(
    ["--request", "request_file"],
    metavar="FILE",
    help="Request document, JSON or YAML; - is standard input. Flags win over it.",
)
_OFFLINE: Final = click.Option(
    ["--offline"], is_flag=True, help="Never ask the Hub for a model's configuration."
)
_JSON: Final = click.Option(["--json", "as_json"], is_flag=True, help="Print the result document.")


@click.command(
    cls=GroupedHelp,
    name="dry-run",
    short_help="Run the real training step on fake tensors: no GPU needed.",
    params=[
        _REQUEST_FILE,
        _JSON,
        click.Option(
            ["--trace", "trace_file"],
            type=click.Path(path_type=Path, dir_okay=False),
            help="Write every allocation: .pickle for pytorch.org/memory_viz, .json for Perfetto.",
        ),
        click.Option(
            ["--svg", "svg_file"],
            type=click.Path(path_type=Path, dir_okay=False),
            help="Write a picture of memory over the step.",
        ),
        _OFFLINE,
        *request_options(),
    ],
)
@click.pass_context
def dry_run(ctx: click.Context, /, **options: Any) -> int:
    """Run the real training step on fake tensors: no GPU, no weights.

    \b
    estimate dry-run --model meta-llama/Llama-3.1-8B --method lora --trace step.pickle
    """
    from profiler import document, engine

    request = request_from_flags(ctx)
    with progress_bar() as progress:
        run = engine.run(request, _config(request, options), progress=progress)
    answer = document.result(request, run)
    if options["trace_file"] is not None:
        from profiler.export import viewer_events
        from profiler.trace_export import write_trace

        write_trace(options["trace_file"], viewer_events(run.trace))
    if options["svg_file"] is not None:
        _write_picture(options["svg_file"], run)
    if options["as_json"]:
        from estimator.render.document import to_json

        click.echo(to_json(answer), nl=False)
    else:
        click.echo(_text(answer, run))
    return exit_code(request, answer)


@click.command(
    cls=GroupedHelp,
    name="compare-engines",
    short_help="Subtract the dry run from the analytic engine by row.",
    params=[_REQUEST_FILE, _OFFLINE, *request_options()],
)
@click.pass_context
def compare_engines(ctx: click.Context, /, **options: Any) -> int:
    """Subtract the dry run from the analytic engine, row by row."""
    from estimator import service
    from estimator.catalog import Access
    from profiler import engine
    from profiler.comparison import subtract

    request = request_from_flags(ctx)
    access = Access.LOCAL if options["offline"] else Access.HUB
    analytic = service.estimate(request, access=access)
    with progress_bar() as progress:
        traced = engine.dry_run(request, _config(request, options), progress=progress)
    click.echo(_difference_text(subtract(analytic, traced)))
    return 0


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show on standard error, if it is a terminal, how far the work is."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    terminal = sys.stderr.isatty()
    with Bar(console=Console(stderr=True), transient=True, disable=not terminal) as bar:
        task = bar.add_task("loading torch and transformers", total=1.0)

        def progress(share: float, text: str) -> None:
            bar.update(task, completed=share, description=text)

        yield progress


def _config(request: EstimateRequest, options: dict[str, Any]) -> dict[str, Any]:
    from estimator.catalog import Access
    from estimator.service import model_config

    access = Access.LOCAL if options["offline"] else Access.HUB
    return dict(model_config(request, access).config)


def _text(answer: Result, run: Any) -> str:
    from estimator.render.text import to_text
    from profiler.export import series
    from profiler.picture import terminal

    return f"{to_text(answer)}\n{terminal(series(run.trace))}"


def _write_picture(path: Path, run: Any) -> None:
    from profiler.export import series
    from profiler.picture import svg

    path.write_text(svg(series(run.trace)), encoding="utf-8")


def _difference_text(found: Comparison) -> str:
    left, right = found.engines
    lines = [
        f"{'':28} {left:>20} {right:>20} {'difference':>20}",
        _line(found.peak),
        *(
            [f"peak moment: {found.moments[0]!r} against {found.moments[1]!r}"]
            if found.moments[0] != found.moments[1]
            else []
        ),
        "",
        "highest point of each phase",
        *map(_line, found.phases),
        "",
        "components at the peak",
        *map(_line, found.components),
    ]
    for name, rows in ((left, found.only_left), (right, found.only_right)):
        if rows:
            lines += ["", f"rows that only {name} has"]
            lines += [
                f"{row.bytes:>20,}  {row.count} x {row.name} ({row.site})"
                for row in rows[:_ROWS_SHOWN]
            ]
            if len(rows) > _ROWS_SHOWN:
                lines.append(f"... and {len(rows) - _ROWS_SHOWN} smaller ones")
    return "\n".join(lines)


def _line(each: Difference) -> str:
    share = f" ({each.bytes / each.right:+.2%})" if each.right else ""
    return f"{each.name:28} {each.left:>20,} {each.right:>20,} {each.bytes:>+20,}{share}"
