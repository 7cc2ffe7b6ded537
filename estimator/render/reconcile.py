"""What would explain a measurement, as a person reads it: the sentence first, then the terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from estimator.measurement import METERS
from estimator.out_of_memory import Diagnosis
from estimator.reconcile import Hypothesis, Reconciliation
from estimator.render.text import PLAIN, Page, open_page, page_text, printable, table, write_pairs
from estimator.result import Range
from estimator.units import gib, printed

if TYPE_CHECKING:
    from rich.console import Console

TERMS_SHOWN: Final = 12


def to_text(found: Reconciliation, page: Page = PLAIN) -> str:
    """Return the whole answer."""
    console = open_page(page)
    console.print(printable(found.message), style="bold")
    if found.out_of_memory is not None:
        _write_diagnosis(console, found.out_of_memory, page)
    if found.reading is not None and found.predicted_bytes is not None:
        _write_numbers(console, found)
        _write_hypotheses(console, found)
        _write_terms(console, found, page)
    _write_list(console, "Not tried", found.not_tried)
    _write_list(console, "Notes", found.notes)
    return page_text(console, page)


def _write_numbers(console: Console, found: Reconciliation) -> None:
    assert found.reading is not None
    assert found.predicted_bytes is not None
    assert found.gap_bytes is not None
    read, predicted = found.reading, found.predicted_bytes
    console.print()
    write_pairs(
        console,
        ("model", printable(found.model or "")),
        ("measured", f"{printable(read.written)}, {METERS[read.meter]}"),
        ("estimated", f"{gib(predicted.expected)}, {_range(predicted)}"),
        ("difference", signed(found.gap_bytes)),
    )


def _write_hypotheses(console: Console, found: Reconciliation) -> None:
    console.print()
    if not found.hypotheses:
        console.print(f"Unexplained: {signed(found.unexplained_bytes or 0)}", style="bold")
        return
    console.print("What would explain it", style="bold")
    for number, each in enumerate(found.hypotheses, start=1):
        console.print(f"  {number}. {printable(each.summary)}")
        write_pairs(console, ("", hypothesis_line(each)), indent=4)
    if found.rivals:
        size = len(found.hypotheses[0].terms)
        console.print(f"  {found.rivals} other sets of {size} changes would explain as much.")


def hypothesis_line(each: Hypothesis) -> str:
    """Say how much a hypothesis would explain and what it leaves."""
    line = (
        f"{signed(each.difference_bytes)}: would explain {each.explained:.0%}, "
        f"leaves {signed(each.left_bytes)}"
    )
    return line if each.inside else f"{line}, and the measurement still outside"


def _write_terms(console: Console, found: Reconciliation, page: Page) -> None:
    shown = [each for each in found.terms if signed(each.difference_bytes) != "0.00 GiB"]
    rows = table(page, "what each change alone would do", "difference")
    for term in shown[:TERMS_SHOWN]:
        rows.add_row(printable(term.summary), signed(term.difference_bytes))
    console.print()
    console.print(rows)
    rest = len(found.terms) - len(shown[:TERMS_SHOWN])
    if rest:
        console.print(f"{rest} more change less; --json has them all.")


def _write_diagnosis(console: Console, found: Diagnosis, page: Page) -> None:
    message = found.message
    said = (
        ("tried to allocate", message.tried_bytes),
        ("allocated", message.allocated_bytes),
        ("reserved", message.reserved_bytes),
        ("free on the card", message.free_bytes),
        ("used on the card", message.used_bytes),
        ("this process", message.process_bytes),
        ("other processes", message.others_bytes),
        ("allowed", message.allowed_bytes),
        ("the card", message.total_bytes),
    )
    console.print()
    console.print(f"The message ({message.speaker})", style="bold")
    write_pairs(
        console,
        *((name, printed(size.expected)) for name, size in said if size is not None),
        indent=2,
    )
    for finding in found.findings:
        console.print(f"{finding.cause}: {finding.summary}")
        write_pairs(console, ("-", finding.advice), indent=2)
    if found.askers:
        console.print()
        rows = table(page, "who asks for that much", "size", "allocated then")
        for asker in found.askers:
            where = f"{asker.moment}, {asker.turn}: {asker.tensor}"
            rows.add_row(printable(where), printed(asker.size_bytes), gib(asker.allocated_bytes))
        console.print(rows)
    for number, suggestion in enumerate(found.suggestions, start=1):
        if number == 1:
            console.print("What would make the run smaller", style="bold")
        console.print(f"  {number}. {printable(suggestion.summary)}")
        console.print(f"     saves {gib(suggestion.saves_bytes)}")


def _write_list(console: Console, title: str, lines: tuple[str, ...]) -> None:
    if not lines:
        return
    console.print()
    console.print(title, style="bold")
    for line in lines:
        write_pairs(console, ("-", printable(line)), indent=2)


def signed(value: int) -> str:
    """Write a difference with its sign.

    Example:
        >>> signed(-(2**30)), signed(0)
        ('-1.00 GiB', '0.00 GiB')
    """
    text = gib(abs(value))
    return text if text == "0.00 GiB" else f"{'+' if value > 0 else '-'}{text}"


def _range(size: Range) -> str:
    if size.low == size.high:
        return gib(size.expected)
    return f"{gib(size.low)} to {gib(size.high)}"
