"""The result as a person reads it in a terminal: the verdict first, then what it rests on."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, cast

from msgspec import Struct

from estimator.render.waterfall import PRICES, write_waterfall
from estimator.result import ComponentRows, Range, Result, Suggestion, Verdict
from estimator.units import gib

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ROWS_PER_COMPONENT: Final = 3
SUGGESTIONS_SHOWN: Final = 3
MIN_WIDTH: Final = 40
COLOURS: Final[dict[Verdict, str]] = {
    "fits": "green",
    "tight": "yellow",
    "does_not_fit": "red",
    "unknown": "cyan",
}
VERDICTS: Final[dict[Verdict, str]] = {
    "fits": "fits",
    "tight": "is tight",
    "does_not_fit": "does not fit",
    "unknown": "is unknown",
}
_ASCII: Final = str.maketrans(
    {"×": "x", "·": "-", "█": "#", "░": ".", "─": "-", "–": "-", "…": "..."}
)


class Page(Struct, frozen=True):
    """What the text is written for: its columns, and whether it shows colour and block signs."""

    width: int = 80
    colour: bool = False
    unicode: bool = True


PLAIN: Final = Page()


def printable(text: str) -> str:
    """Return the text without control characters, so that a model's name cannot drive a terminal.

    Example:
        >>> printable("evil\\x1b[2Jname")
        'evil[2Jname'
    """
    return "".join(
        " " if sign.isspace() else sign
        for sign in text
        if sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cf", "Cs")
    )


def thin(value: int) -> str:
    """Write a count in groups of three.

    Example:
        >>> thin(8_030_261_248)
        '8 030 261 248'
    """
    return f"{value:,}".replace(",", " ")


def share(part: int, whole: int) -> str:
    """Write a part of a whole in per cent.

    Example:
        >>> share(1, 8)
        '12.5 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else "-"


def to_text(result: Result, page: Page = PLAIN) -> str:
    """Return the whole answer: verdict, breakdown, quantities, timeline, limits, suggestions."""
    console = open_page(page)
    console.print(printable(result.message), style=f"bold {COLOURS[result.verdict]}")
    _write_subject(console, result)
    console.print(_breakdown(result, page))
    console.print(_quantities(result, page))
    _write_timeline(console, result, page)
    write_waterfall(console, result)
    _write_limits(console, result)
    _write_suggestions(console, result.suggestions[:SUGGESTIONS_SHOWN])
    _write_list(console, "Assumed", result.assumptions)
    _write_list(console, "Notes", result.notes)
    _write_list(console, "Not modelled", result.not_modelled)
    return page_text(console, page)


def to_line(result: Result, page: Page = PLAIN) -> str:
    """Return the verdict alone, as one line however narrow the page is."""
    line = f"{printable(result.message)}\n"
    return line if page.unicode else _in_ascii(line)


def open_page(page: Page) -> Console:
    """Return a console that keeps what is written to it."""
    # Imported here: the JSON path must not pay for rich.
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=max(page.width, MIN_WIDTH),
        force_terminal=page.colour,
        color_system="standard" if page.colour else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )


def page_text(console: Console, page: Page) -> str:
    """Return what was written to the console, in the signs that the page can show."""
    written = cast("io.StringIO", console.file).getvalue()
    text = "".join(f"{line.rstrip()}\n" for line in written.splitlines())
    return text if page.unicode else _in_ascii(text)


def _in_ascii(text: str) -> str:
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def table(page: Page, *columns: str) -> Table:
    """Return an empty table with a rule under its head; all columns but the first are numbers."""
    from rich import box
    from rich.table import Table

    empty = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        if index:
            empty.add_column(column, justify="right", no_wrap=True)
        else:
            empty.add_column(column, overflow="fold", ratio=1 if page.width < 80 else None)
    return empty


def _write_subject(console: Console, result: Result) -> None:
    """Write the model, its size and the run that was asked for, defaults included."""
    counts = result.parameters
    active = "" if counts.active == counts.total else f" · active {thin(counts.active)}"
    trained = share(counts.trainable, counts.total)
    console.print()
    write_pairs(
        console,
        ("model", printable(result.model)),
        ("parameters", f"{thin(counts.total)}{active}"),
        ("trainable", f"{thin(counts.trainable)} ({trained})"),
        ("run", printable(_run(result.request))),
    )


def write_pairs(console: Console, *pairs: tuple[str, str], indent: int = 0) -> None:
    """Write labelled lines; a text that is too long goes on below itself, not below its label."""
    from rich.table import Table

    lines = Table.grid(padding=(0, 2), pad_edge=False)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for label, text in pairs:
        lines.add_row(" " * indent + label, text)
    console.print(lines)


def _run(request: dict[str, Any]) -> str:
    """Say the recipe in one line, in the words of the request."""

    def part(section: str, *fields: str) -> str:
        values = request.get(section)
        if not isinstance(values, dict):
            return ""
        return " ".join(
            str(values[field]) if field == "name" else f"{field}={values[field]}"
            for field in fields
            if values.get(field) is not None
        )

    batch, length = request.get("micro_batch_size"), request.get("seq_len")
    said = (
        part("method", "name", "r"),
        part("quantization", "name"),
        str(request.get("precision", "")),
        f"autocast {request['autocast']}" if request.get("autocast") else "",
        part("fp8", "name", "recipe"),
        "qat" if request.get("qat") else "",
        part("optimizer", "name", "implementation"),
        f"micro-batch {batch} × {length} tokens" if batch and length else "",
        f"checkpointing {request.get('activation_checkpointing', 'none')}",
        str(request.get("attention", "")),
    )
    return " · ".join(words for words in said if words)


def _breakdown(result: Result, page: Page) -> Table:
    """Return the components at the peak, the largest rows under each, and their sum."""
    rows = table(page, f"at the peak: {printable(result.peak.moment)}", "bytes", "size", "share")
    whole = sum(component.bytes for component in result.breakdown)
    for component in result.breakdown:
        name = component.component.replace("_", " ")
        rows.add_row(*_amount(name, component.bytes, whole), style="bold")
        for label, size in _largest(component):
            rows.add_row(*_amount(f"  {printable(label)}", size, whole))
    rows.add_section()
    rows.add_row(*_amount(f"sum{_measured_as(result, whole)}", whole, whole), style="bold")
    return rows


def _amount(name: str, size: int, whole: int) -> tuple[str, str, str, str]:
    return name, thin(size), gib(size), share(size, whole)


def _largest(component: ComponentRows) -> Iterable[tuple[str, int]]:
    """Yield the largest rows, then the rest as one, so that what is shown adds up."""
    rows = sorted(component.rows, key=lambda row: row.bytes, reverse=True)
    # A "rest" of one row would take the place of that row's own name.
    shown = len(rows) if len(rows) <= ROWS_PER_COMPONENT + 1 else ROWS_PER_COMPONENT
    for row in rows[:shown]:
        yield row.name, row.bytes
    if rest := rows[shown:]:
        yield f"{len(rest)} smaller rows", sum(row.bytes for row in rest)


def _four_quantities(result: Result) -> tuple[tuple[str, Range], ...]:
    peak = result.peak
    return (
        ("allocated", peak.allocated_bytes),
        ("reserved", peak.reserved_bytes),
        ("device-used", peak.device_used_bytes),
        ("needed", peak.needed_bytes),
        ("host", peak.host_bytes),
    )


def _measured_as(result: Result, whole: int) -> str:
    """Name the quantity that the rows add up to."""
    names = (name for name, value in _four_quantities(result) if value.expected == whole)
    name = next(names, None)
    return f" = {name}, expected" if name else ""


def _quantities(result: Result, page: Page) -> Table:
    rows = table(page, "peak of the step", "low", "expected", "high")
    for name, value in _four_quantities(result):
        # A quantity that no engine models is 0 to 0, and must not read like an answer.
        sizes = (value.low, value.expected, value.high)
        rows.add_row(name, *(gib(size) if value.high else "-" for size in sizes))
    usable = result.capacity.usable_bytes
    if usable is not None:
        gpu = printable(result.capacity.gpu or "the memory given")
        rows.add_row(f"usable on {gpu}", "", gib(usable), "")
    return rows


def _write_timeline(console: Console, result: Result, page: Page) -> None:
    """Write one bar for each moment, in the order of the step."""
    if not result.timeline:
        return
    highest = max(moment.bytes for moment in result.timeline) or 1
    names = [printable(moment.moment) for moment in result.timeline]
    name_width = min(max(map(len, names)), console.width // 2)
    bar_width = max(console.width - name_width - len(" 1,234.56 GiB peak "), 5)
    console.print("Allocated over the step", style="bold")
    for name, moment in zip(names, result.timeline, strict=True):
        bar = "█" * max(round(bar_width * moment.bytes / highest), 1)
        mark = " peak" if moment.moment == result.peak.moment else ""
        console.print(
            f"{name[:name_width]:{name_width}} {bar:{bar_width}} {gib(moment.bytes):>12}{mark}",
            style="bold" if mark else "",
            overflow="crop",
            no_wrap=True,
        )
    if result.peak.runner_up:
        behind = result.peak.runner_up
        console.print(f"next highest: {printable(behind.moment)}, {gib(behind.gap_bytes)} below")
    console.print()


def _write_limits(console: Console, result: Result) -> None:
    limits, request = result.limits, result.request
    lines = [
        ("largest micro-batch", limits.max_micro_batch_size, f"at {request.get('seq_len')} tokens"),
        (
            "longest sequence",
            limits.max_seq_len,
            f"at micro-batch {request.get('micro_batch_size')}",
        ),
        ("smallest GPU", limits.smallest_gpu, "of the catalogue"),
        ("fewest GPUs", limits.min_gpus, "of this kind"),
    ]
    known = [(name, value, where) for name, value, where in lines if value is not None]
    if not known:
        return
    console.print("What fits", style="bold")
    for name, value, where in known:
        if isinstance(value, str):
            said = printable(value)
        else:
            said = thin(value) if value else "not even 1"
        console.print(f"  {name:20} {said} ({where})")
    console.print()


def _write_suggestions(console: Console, suggestions: Iterable[Suggestion]) -> None:
    for number, suggestion in enumerate(suggestions, start=1):
        if number == 1:
            console.print("Suggestions", style="bold")
        console.print(f"  {number}. {printable(suggestion.summary)}")
        console.print(
            f"     saves {gib(suggestion.saves_bytes)} · {PRICES[suggestion.cost]}"
            f" · then it {VERDICTS[suggestion.verdict_after]}"
        )


def _write_list(console: Console, title: str, lines: Iterable[str]) -> None:
    items = [printable(line) for line in lines]
    if not items:
        return
    console.print()
    console.print(title, style="bold")
    for item in items:
        write_pairs(console, ("-", item), indent=2)
