"""The command `estimate`: it reads flags and files, calls the core, and writes what came back.

Standard output carries the result, standard error everything else, one line each.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
from click.core import ParameterSource

from estimator import __version__
from estimator.errors import (
    CannotEstimateError,
    EstimatorError,
    MissingDependencyError,
    did_you_mean,
)
from estimator.flags import (
    GroupedHelp,
    given_flags,
    overlay,
    parse_flagged,
    request_options,
)
from estimator.plugins import COMMANDS, load_plugin, missing_dependency, plugin_names

if TYPE_CHECKING:
    from estimator.render.text import Page
    from estimator.request import EstimateRequest
    from estimator.result import Result

EXIT_FITS: Final = 0
EXIT_DOES_NOT_FIT: Final = 1
EXIT_USAGE: Final = 2
EXIT_CANNOT_ESTIMATE: Final = CannotEstimateError.exit_code
EXIT_TIGHT: Final = 4
EXIT_INTERRUPTED: Final = 130
MAX_LINE: Final = 600

_EPILOG: Final = """\
\b
Exit codes: 0 fits, or no GPU was named to judge by; 1 does not fit; 2 usage or
configuration error; 3 cannot estimate; 4 tight, only with --fail-on tight.

\b
Completion: eval "$(_ESTIMATE_COMPLETE=bash_source estimate)"  (or zsh_source, fish_source)
"""


class EstimateGroup(GroupedHelp, click.Group):
    """The command itself, its own subcommands, and those that other packages bring."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all subcommands; the only place that looks for other packages'."""
        return sorted({*super().list_commands(ctx), *_LATE, *plugin_names(COMMANDS)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a subcommand; one that lacks its extra says so when it is called."""
        own = super().get_command(ctx, cmd_name)
        if own is None and cmd_name in _LATE:
            own = _LATE[cmd_name]()
        if own is not None:
            return own
        try:
            loaded: click.Command | None = load_plugin(COMMANDS, cmd_name)
        except MissingDependencyError as error:
            return _unavailable(cmd_name, error)
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown word with the two things that it may have been meant to be."""
        command = self.get_command(ctx, args[0])
        if command is None:
            known = self.list_commands(ctx)
            raise click.UsageError(
                f"no such command {args[0]!r}{did_you_mean(args[0], known)}; "
                f"known: {', '.join(known)}; a model is named with --model"
            )
        return args[0], command, args[1:]


def _reconcile() -> click.Command:
    from estimator.reconcile_command import reconcile

    return reconcile


# Commands of our own that the plain estimate does not load.
_LATE: Final[dict[str, Callable[[], click.Command]]] = {"reconcile": _reconcile}


def _unavailable(name: str, error: MissingDependencyError) -> click.Command:
    def refuse(rest: tuple[str, ...]) -> NoReturn:
        raise error

    return click.Command(
        name,
        params=[click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED)],
        callback=refuse,
        short_help=f"Not installed: {error}",
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
    )


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        write_out(f"vramplan {__version__}\n")
        ctx.exit()


REQUEST_FILE: Final = click.Option(
    ["--request", "request_file"],
    metavar="FILE",
    help="Request document, JSON or YAML; - is standard input. Flags win over it.",
)
JSON: Final = click.Option(["--json", "as_json"], is_flag=True, help="Print the result document.")
OFFLINE: Final = click.Option(
    ["--offline"], is_flag=True, help="Never ask the Hub for a model's configuration."
)
NO_COLOR: Final = click.Option(
    ["--no-color"], is_flag=True, help="Plain text; NO_COLOR does the same."
)


@click.group(
    cls=EstimateGroup,
    name="estimate",
    invoke_without_command=True,
    subcommand_metavar="[COMMAND [ARGS]...]",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    params=[
        REQUEST_FILE,
        JSON,
        click.Option(
            ["--explain"],
            is_flag=True,
            help="Add the derivation of every row; --json always holds it.",
        ),
        click.Option(["--quiet"], is_flag=True, help="Print the verdict line only."),
        click.Option(
            ["--engine"],
            default="analytic",
            show_default=True,
            help="analytic, dry-run, or auto: the dry run where the analytic engine refuses.",
        ),
        click.Option(
            ["--fail-on"], type=click.Choice(["tight"]), help="Exit 4 when the run fits tightly."
        ),
        OFFLINE,
        NO_COLOR,
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Print the version.",
        ),
        *request_options(),
    ],
)
@click.pass_context
def estimate(ctx: click.Context, /, **options: Any) -> int:
    """Say whether a fine-tuning run fits in GPU memory, and why.

    \b
    estimate --model meta-llama/Llama-3.1-8B --method qlora --gpu rtx-4090
    """
    if ctx.invoked_subcommand is not None:
        _refuse_stray_flags(ctx)
        return 0
    _refuse_contradictions(options)
    request = request_from_flags(ctx)
    result = _answer(request, options)
    write_out(_rendered(result, options))
    return exit_code(request, result, fail_on=options["fail_on"])


def _refuse_stray_flags(ctx: click.Context) -> None:
    """Refuse flags before a subcommand, which nobody would read."""
    for parameter in ctx.command.get_params(ctx):
        name = parameter.name or ""
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            sub = ctx.invoked_subcommand
            raise click.UsageError(f"write {parameter.opts[0]} after `{sub}`, not before it")


def _refuse_contradictions(options: dict[str, Any]) -> None:
    if options["quiet"] and (options["as_json"] or options["explain"]):
        raise click.UsageError("--quiet prints one line; leave out --json and --explain")


def request_from_flags(ctx: click.Context) -> EstimateRequest:
    """Return the request of a command that has `--request` and the flags of `request_options`.

    `--gpu auto` is answered here, because only the command line stands on the user's machine.
    """
    from estimator.request_file import read_request_document

    given = given_flags(ctx)
    path = ctx.params["request_file"]
    document = overlay(read_request_document(path) if path is not None else {}, given)
    if "model" not in document:
        raise click.UsageError("name a model: --model ID, or --request FILE; see estimate --help")
    return parse_flagged(_with_live_gpu(document), given)


def _with_live_gpu(document: dict[str, Any]) -> dict[str, Any]:
    """Replace the GPU `auto` by the card of this machine, and by what others hold of it now."""
    hardware = document.get("hardware")
    if not isinstance(hardware, dict) or hardware.get("gpu") != "auto":
        return document
    from estimator.catalog import find_gpu
    from estimator.errors import UnknownGpuError
    from estimator.nvml import probe
    from estimator.units import gib

    live = probe()
    found: dict[str, Any] = {"reserved_by_others_bytes": live.used_by_others_bytes}
    try:
        # The catalogue knows what torch can use of the card; the driver's total is a little more.
        found["gpu"] = find_gpu(live.name).key
    except UnknownGpuError:
        found |= {"gpu": live.name, "memory_bytes": live.total_bytes}
    held, total = gib(live.used_by_others_bytes), gib(live.total_bytes)
    _note(f"{live.name}: other processes hold {held} of {total}")
    typed = {name: value for name, value in hardware.items() if value is not None}
    return {**document, "hardware": {**found, **typed, "gpu": found["gpu"]}}


def _answer(request: EstimateRequest, options: dict[str, Any]) -> Result:
    from estimator.catalog import Access
    from estimator.engines import answer

    access = Access.LOCAL if options["offline"] else Access.HUB
    return answer(request, engine=options["engine"], access=access)


def _rendered(result: Result, options: dict[str, Any]) -> str | bytes:
    if options["as_json"]:
        from estimator.render.document import to_json

        return to_json(result)
    from estimator.render.text import to_line, to_text

    page = terminal_page(no_color=options["no_color"])
    if options["quiet"]:
        return to_line(result, page)
    if options["explain"]:
        from estimator.render.explain import to_explanation

        return f"{to_text(result, page)}\n{to_explanation(result, page)}"
    return to_text(result, page)


def exit_code(request: EstimateRequest, result: Result, *, fail_on: str | None = None) -> int:
    """Return what the shell learns of the verdict.

    A request that names no GPU asks how much, not whether: its answer is a success. A GPU that was
    named and could not be judged is none.
    """
    if result.verdict == "unknown":
        hardware = request.hardware
        judged = hardware.gpu is not None or hardware.memory_bytes is not None
        return EXIT_CANNOT_ESTIMATE if judged else EXIT_FITS
    if result.verdict == "does_not_fit":
        return EXIT_DOES_NOT_FIT
    return EXIT_TIGHT if result.verdict == fail_on else EXIT_FITS


@estimate.command(name="models", params=[JSON, NO_COLOR], short_help="List the catalogue's models.")
@click.argument("pattern", default="")
def list_models(pattern: str, as_json: bool, no_color: bool) -> int:
    """List the catalogue's models; PATTERN is a part of a name, or has * in it."""
    from estimator.catalog import models
    from estimator.render import listing

    found = [model for model in models() if _matches(pattern, (model.id, *model.aliases))]
    _write_listing(found, as_json, no_color, listing.models_document, listing.models_text)
    return EXIT_FITS


@estimate.command(name="gpus", params=[JSON, NO_COLOR], short_help="List the catalogue's GPUs.")
@click.argument("pattern", default="")
def list_gpus(pattern: str, as_json: bool, no_color: bool) -> int:
    """List the catalogue's GPUs; PATTERN is a part of a name, or has * in it."""
    from estimator.catalog import gpus
    from estimator.render import listing

    found = [gpu for gpu in gpus() if _matches(pattern, (gpu.key, gpu.name, *gpu.aliases))]
    _write_listing(found, as_json, no_color, listing.gpus_document, listing.gpus_text)
    return EXIT_FITS


def _matches(pattern: str, names: Sequence[str]) -> bool:
    wanted = pattern.lower() if "*" in pattern else f"*{pattern.lower()}*"
    return any(fnmatchcase(name.lower(), wanted) for name in names)


def _write_listing(
    found: list[Any],
    as_json: bool,
    no_color: bool,
    document: Callable[[list[Any]], str],
    text: Callable[[list[Any], Page], str],
) -> None:
    write_out(document(found) if as_json else text(found, terminal_page(no_color=no_color)))
    if not found:
        _note("nothing in the catalogue has this in its name")


def terminal_page(*, no_color: bool) -> Page:
    """Return what the terminal, or the file behind standard output, can show."""
    from estimator.render.text import Page

    plain = no_color or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return Page(
        width=shutil.get_terminal_size().columns,
        colour=sys.stdout.isatty() and not plain,
        unicode=encoding.lower().startswith("utf"),
    )


def write_out(text: str | bytes) -> None:
    """Write the result; a reader that has seen enough, such as `head`, is no error."""
    try:
        click.echo(text, nl=False, color=True)
    except BrokenPipeError:
        # The interpreter flushes standard output once more as it ends, and must not fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note(text: str) -> None:
    click.echo(f"note: {_one_line(text)}", err=True)


def _one_line(text: str) -> str:
    """Return the text as one line; of a very long one, both ends."""
    from estimator.render.text import printable

    line = " ".join(printable(text).split())
    middle = MAX_LINE // 2
    return line if len(line) <= MAX_LINE else f"{line[:middle]} ... {line[-middle:]}"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; whatever went wrong is one line on stderr."""
    try:
        outcome = estimate.main(args=arguments, prog_name="estimate", standalone_mode=False)
        return outcome if isinstance(outcome, int) else EXIT_FITS
    except click.NoSuchOption as error:
        given = sys.argv[1:] if arguments is None else arguments
        return _failed(error.format_message() + _two_dashes(error, given), error.exit_code)
    except click.ClickException as error:
        return _failed(error.format_message(), error.exit_code)
    except EstimatorError as error:
        return _failed(str(error), error.exit_code)
    except ImportError as error:
        refusal = missing_dependency(error, "this command")
        return _failed(str(refusal), refusal.exit_code)
    except OSError as error:
        return _failed(f"{error.strerror or error}", EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED


def _two_dashes(error: click.NoSuchOption, given: Sequence[str]) -> str:
    """Return what to write instead of a long option that was typed with one dash."""
    if error.option_name.startswith("--"):
        return ""
    wide = (each for each in given if len(each) > 2 and each.startswith(error.option_name))
    word = next(wide, None)
    return "" if word is None else f" Long options begin with two dashes: -{word}"


def _failed(message: str, code: int) -> int:
    click.echo(f"error: {_one_line(message)}", err=True)
    return code
