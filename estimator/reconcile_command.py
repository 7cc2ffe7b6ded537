"""The command `estimate reconcile`: a measurement, or a message, and what would explain it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from estimator.commands import (
    EXIT_FITS,
    JSON,
    NO_COLOR,
    OFFLINE,
    REQUEST_FILE,
    request_from_flags,
    terminal_page,
    write_out,
)
from estimator.errors import InvalidRequestError, MalformedDocumentError
from estimator.flags import FLAGS, GroupedHelp, given_flags, request_options
from estimator.measurement import METERS, Measurement
from estimator.oom_message import MAX_MESSAGE_CHARACTERS

# A character of UTF-8 has at most four bytes.
_MAX_BYTES: Final = 4 * MAX_MESSAGE_CHARACTERS


@click.command(
    cls=GroupedHelp,
    name="reconcile",
    short_help="Say what would explain a measurement, or an OOM message.",
    params=[
        click.Option(
            ["--measured"], metavar="SIZE", help="What was measured: 19.4GiB, 20.8GB, 19866MiB."
        ),
        click.Option(
            ["--meter"],
            type=click.Choice(list(METERS)),
            help="Which meter read it; allocated is torch.cuda.max_memory_allocated.  "
            "[default: allocated]",
        ),
        click.Option(
            ["--oom"],
            metavar="FILE",
            help="An out-of-memory message or a table of nvidia-smi; - is standard input.",
        ),
        REQUEST_FILE,
        JSON,
        OFFLINE,
        NO_COLOR,
        *request_options(),
    ],
)
@click.pass_context
def reconcile(ctx: click.Context, /, **options: Any) -> int:
    """Say what would explain a measurement, or an out-of-memory message.

    \b
    estimate reconcile --request run.json --measured 19.4GiB --meter allocated
    estimate reconcile --request run.json --oom error.txt
    """
    from estimator import service
    from estimator.catalog import Access

    if options["measured"] is None and options["oom"] is None:
        raise click.UsageError("give --measured 19.4GiB, or --oom FILE with a message")
    if options["oom"] == "-" and options["request_file"] == "-":
        raise click.UsageError("--request and --oom cannot both be standard input")
    asked = Measurement(
        request=request_from_flags(ctx) if _names_a_run(ctx) else None,
        measured=options["measured"],
        meter=options["meter"],
        message=None if options["oom"] is None else _message(options["oom"]),
    )
    access = Access.LOCAL if options["offline"] else Access.HUB
    try:
        found = service.reconcile(asked, access=access)
    except InvalidRequestError as error:
        raise _named(error) from None
    write_out(_rendered(found, options))
    return EXIT_FITS


def _names_a_run(ctx: click.Context) -> bool:
    """Whether there is a request: a message may also come alone, but a flag never without one."""
    return (
        ctx.params["request_file"] is not None
        or ctx.params["measured"] is not None
        or bool(given_flags(ctx))
    )


def _named(error: InvalidRequestError) -> InvalidRequestError:
    """Return the refusal with the flag's name instead of the field's."""
    flags = {"/measured": "--measured", "/meter": "--meter", "/message": "--oom"}
    flags |= {f"/request{flag.pointer}": flag.option for flag in FLAGS}
    lines = [f"{flags[at]}: {why}" for at, why in error.errors if at in flags]
    return InvalidRequestError("; ".join(lines) or str(error), error.errors)


def _message(path: str) -> str:
    """Return the text of a message, never reading more than is allowed."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            content = sys.stdin.buffer.read(_MAX_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is closed"
        raise MalformedDocumentError(f"cannot read {name}: {reason}") from None
    if len(content) > _MAX_BYTES:
        raise MalformedDocumentError(
            f"{name} is larger than {_MAX_BYTES} bytes; give the lines around the message only"
        )
    # A log may hold anything; what is no UTF-8 is no part of the message.
    return content.decode("utf-8", "replace")


def _rendered(found: Any, options: dict[str, Any]) -> str | bytes:
    if options["as_json"]:
        from estimator.render.document import to_json

        return to_json(found)
    from estimator.render.reconcile import to_text

    return to_text(found, terminal_page(no_color=options["no_color"]))
