"""The command `estimate calibrate`: from measurement records to the files that give the ranges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from estimator.calibration_file import FOLDER, Calibration, encode
from estimator.catalog.folder import data_folder
from estimator.errors import EstimatorError
from estimator.flags import GroupedHelp
from profiler.calibrate import CONFIDENCE, calibrations
from profiler.cli import progress_bar
from profiler.whole_file import write_whole

_CHANGED: Final = 1


@click.command(
    cls=GroupedHelp,
    name="calibrate",
    short_help="Compute ranges and constants from measurement records.",
)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the calibration files.  [default: data/calibration]",
)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file would change.")
@click.option(
    "--allow-simulated",
    is_flag=True,
    help="Take records of a simulated device too; their files are never used for an answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the calibrations.")
def calibrate(
    *, files: tuple[Path, ...], out: Path | None, check: bool, allow_simulated: bool, as_json: bool
) -> int:
    """Compute ranges and device constants from measurement records.

    FILES are JSON lines as `estimate measure` and `estimate campaign` append them; without any,
    all of data/measurements and the published runs.

    \b
    estimate calibrate
    estimate calibrate my-card.jsonl --out my-calibration
    """
    if allow_simulated and out is None:
        raise click.UsageError("--allow-simulated needs --out: no simulated record is ever used")
    folder = out or data_folder() / FOLDER
    with progress_bar() as progress:
        found, left_out = calibrations(
            [path.resolve() for path in files or record_files()],
            root=data_folder().parent if not files else _root(files),
            progress=progress,
            allow_simulated=allow_simulated,
        )
    for text in left_out:
        click.echo(f"left out: {text}", err=True)
    if as_json:
        click.echo(json.dumps([json.loads(encode(each)) for each in found], indent=2))
    else:
        click.echo("\n".join(map(_text, found)))
    if check:
        return _CHANGED if any(_differs(each, folder) for each in found) else 0
    for each in found:
        write(each, folder)
    return 0


def record_files() -> list[Path]:
    """Return every file of records that came with this installation."""
    folder = data_folder()
    published = folder / "published" / "records.jsonl"
    return [*sorted((folder / "measurements").glob("*.jsonl")), published]


def _root(files: tuple[Path, ...]) -> Path:
    """Return the folder that the files' names are told from."""
    parents = [path.resolve().parent for path in files]
    return next(
        folder for folder in (parents[0], *parents[0].parents)
        if all(each.is_relative_to(folder) for each in parents)
    )  # fmt: skip


def write(calibration: Calibration, folder: Path) -> Path:
    """Write one calibration file, whole or not at all.

    Raises:
        EstimatorError: the folder cannot be written.
    """
    path = folder / f"{calibration.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, encode(calibration))
    except OSError as error:
        raise EstimatorError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _differs(calibration: Calibration, folder: Path) -> bool:
    path = folder / f"{calibration.name}.json"
    if path.is_file() and path.read_bytes() == encode(calibration):
        return False
    click.echo(f"{path.name} is out of date; run: estimate calibrate", err=True)
    return True


def _text(each: Calibration) -> str:
    lines = [each.name]
    for stratum in each.strata:
        name = stratum.quantity + (f", {stratum.kind}" if stratum.kind else "")
        groups = ", ".join(f"{group} {count}" for group, count in stratum.groups.items())
        lines.append(
            f"  {name:24} within {stratum.spread(CONFIDENCE):6.1%} at {CONFIDENCE:.0%}; "
            f"{stratum.rows} runs: {groups}"
        )
    for held in each.held_out:
        lines.append(
            f"  {held.quantity:24} {held.inside} of {held.rows} inside ranges made without "
            "their own group"
        )
    context: Any = each.constants.context
    if context is not None:
        lines.append(
            f"  CUDA context             {context.low} to {context.high} B, median "
            f"{context.expected} B"
        )
    return "\n".join(lines)
