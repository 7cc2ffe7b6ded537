"""The derivation of the peak: each row with its formula, the numbers put in, and its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.render.text import (
    PLAIN,
    Page,
    open_page,
    page_text,
    printable,
    share,
    thin,
    write_pairs,
)
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
    console.print()
    write_pairs(
        console,
        ("row", printable(row.name)),
        ("place", f"{component}, {printable(row.site)}, count {thin(row.count)}"),
        ("formula", printable(row.formula)),
        ("bytes", f"{thin(row.bytes)} ({gib(row.bytes)})"),
        ("source", printable(row.source)),
        ("basis", row.basis),
        indent=2,
    )
