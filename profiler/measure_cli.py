"""The command `estimate measure`: flags, one measurement, and a summary beside the prediction.

Standard output carries the record or the summary; remarks go to standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from estimator.commands import request_from_flags
from estimator.flags import GroupedHelp, request_options
from estimator.units import gib
from profiler.measure import DEVICES, MIN_STEPS

if TYPE_CHECKING:
    from estimator.record import Run
    from estimator.request import EstimateRequest
    from estimator.result import Result

_FILE: Final = click.Path(path_type=Path, dir_okay=False)


@click.command(
    cls=GroupedHelp,
    name="measure",
    short_help="Run real training steps on this machine's GPU.",
    params=[
        click.Option(
            ["--request", "request_file"],
            metavar="FILE",
            help="Request document, JSON or YAML; - is standard input. Flags win over it.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the record."),
        click.Option(["--append"], type=_FILE, help="Add the record to a file, one line of JSON."),
        click.Option(
            ["--device"],
            type=click.Choice(DEVICES),
            default=DEVICES[0],
            show_default=True,
            help="simulated: the dry run in place of a GPU; --gpu names its card.",
        ),
        click.Option(
            ["--steps"],
            type=click.IntRange(min=MIN_STEPS),
            default=MIN_STEPS,
            show_default=True,
            help="Optimizer steps to run.",
        ),
        click.Option(
            ["--memory-limit"],
            type=click.IntRange(min=1),
            metavar="BYTES",
            help="What torch's allocator may hold: run out of memory as a smaller card would.",
        ),
        click.Option(
            ["--snapshot"], type=_FILE, help="Write the allocator's history, a .pickle.gz file."
        ),
        click.Option(
            ["--lock"],
            type=_FILE,
            help="Hold the lock of this file from before the device is used to the end.",
        ),
        click.Option(["--group"], default="single", help="The campaign that the record is of."),
        click.Option(["--id", "record_id"], help="Of the record; made up when it is not given."),
        click.Option(
            ["--offline"], is_flag=True, help="Never ask the Hub for a model's configuration."
        ),
        *request_options(),
    ],
)
@click.pass_context
def measure(ctx: click.Context, /, **options: Any) -> int:
    """Run a few real training steps on this machine's GPU and read its meters.

    Random weights are made on the device from the configuration: nothing is downloaded.

    \b
    estimate measure --model Qwen/Qwen3-0.6B --seq-len 2048 --append my-card.jsonl
    """
    from estimator.catalog import Access
    from estimator.record import append, encode
    from estimator.service import model_config, requested_gpu
    from profiler import measurement

    request = request_from_flags(ctx)
    access = Access.LOCAL if options["offline"] else Access.HUB
    config = dict(model_config(request, access).config)
    simulated = options["device"] == "simulated"
    device = measurement.device_named(
        options["device"], requested_gpu(request) if simulated else None
    )
    chosen = measurement.Options(
        steps=options["steps"],
        limit_bytes=options["memory_limit"],
        snapshot=options["snapshot"],
        lock=options["lock"],
        id=options["record_id"],
        group=options["group"],
    )
    run = measurement.measure(request, config, device, chosen)
    if options["append"] is not None:
        try:
            append(options["append"], run)
        except OSError as error:
            raise click.UsageError(f"cannot write {options['append']}: {error.strerror}") from error
    if options["as_json"]:
        click.echo(encode(run).decode(), nl=False)
    else:
        click.echo(summary(run, _predicted(request, run, access)))
    return 0


def _predicted(request: EstimateRequest, run: Run, access: Any) -> Result | None:
    """Return the analytic answer for the card that was measured; None where it has none."""
    from estimator import service
    from estimator.errors import EstimatorError
    from profiler.measurement import on_card

    key = run.environment.gpu_id
    try:
        return service.estimate(on_card(request, key) if key else request, access=access)
    except EstimatorError as error:
        click.echo(f"no prediction to compare with: {error}", err=True)
        return None


def summary(run: Run, predicted: Result | None) -> str:
    """Return the meters of a run for people, beside what was predicted.

    Args:
        run: one record.
        predicted: the analytic answer to the same request, or None.
    """
    steps = f"{run.steps} steps, {run.outcome.replace('_', ' ')}"
    lines = [f"{run.environment.gpu or 'unknown GPU'}, {run.origin}: {steps}"]
    if run.reason is not None:
        lines.append(run.reason)
    lines += ["", f"{'':22} {run.origin:>14} {'predicted':>14} {'difference':>11}"]
    expected = _expected(predicted)
    found = {
        "allocated": run.peak.allocated_bytes,
        "requested": run.peak.requested_bytes,
        "reserved": run.peak.reserved_bytes,
        "device-used": run.peak.device_used_bytes,
    }
    through = run.outcome == "ok"
    lines += [_line(name, size, expected.get(name), through) for name, size in found.items()]
    lines += ["", "allocated at the highest point of each phase"]
    moments = _moments(predicted, {each.phase for each in run.phases})
    lines += [
        _line(each.phase, each.peak.allocated_bytes, moments.get(each.phase), through)
        for each in run.phases
    ]
    if run.idle_bytes is not None:
        lines += ["", f"before the first tensor: {gib(run.idle_bytes)}"]
    if run.step_seconds:
        first, *_, last = run.step_seconds
        lines.append(f"seconds of a step: {last:.3f}, of the first one {first:.3f}")
    return "\n".join(lines)


def _expected(predicted: Result | None) -> dict[str, int]:
    if predicted is None:
        return {}
    peak = predicted.peak
    return {
        "allocated": peak.allocated_bytes.expected,
        "reserved": peak.reserved_bytes.expected,
        "device-used": peak.device_used_bytes.expected,
    }


def _moments(predicted: Result | None, seen: set[str]) -> dict[str, int]:
    """Return the predicted phases; a measured backward holds what backward does of the loss."""
    from profiler.comparison import by_phase

    if predicted is None:
        return {}
    found = by_phase(predicted)
    if "loss backward" in found and "loss backward" not in seen:
        found["backward"] = max(found["loss backward"], found.get("backward", 0))
    return found


def _line(name: str, measured: int | None, predicted: int | None, through: bool) -> str:
    """Return one meter; what a run that ran out of memory read is no peak to compare with."""
    cells = [gib(size) if size is not None else "-" for size in (measured, predicted)]
    share = (
        f"{predicted / measured - 1:+.2%}"
        if through and measured and predicted is not None
        else "-"
    )
    return f"{name:22} {cells[0]:>14} {cells[1]:>14} {share:>11}"
