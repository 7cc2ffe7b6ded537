"""The derivation of the peak: each row with its formula, the numbers put in, and its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.render.text import PLAIN, Page, open_page, page_text, printable, share, thin
from estimator.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from estimator.result import Component, Result, ResultRow


def to_explanation(result: Result, page: Page = PLAIN) -> str:
    """Return every row of the breakdown, by component, so that a reader can check each byte."""
    console = open_page(page)
    whole = sum(component.bytes for component in result.breakdown)
    console.print(f"Every row at the peak: {printable(result.peak.moment)}", style="bold")
    for component in result.breakdown:
        console.print()
        console.print(
            f"{component.component}: {thin(component.bytes)} bytes, {gib(component.bytes)},"
            f" {share(component.bytes, whole)}",
            style="bold",
        )
        for row in component.rows:
            _write_row(console, component.component, row)
    console.print()
    console.print(f"sum: {thin(whole)} bytes, {gib(whole)}", style="bold")
    return page_text(console, page)


def _write_row(console: Console, component: Component, row: ResultRow) -> None:
    from rich.table import Table

    console.print()
    lines = Table.grid(padding=(0, 2), pad_edge=False)
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("  row", printable(row.name), style="bold")
    lines.add_row("  place", f"{component}, {printable(row.site)}, count {thin(row.count)}")
    lines.add_row("  formula", printable(row.formula))
    lines.add_row("  bytes", f"{thin(row.bytes)} ({gib(row.bytes)})")
    lines.add_row("  source", printable(row.source))
    lines.add_row("  basis", row.basis)
    console.print(lines)
