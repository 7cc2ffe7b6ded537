"""The waterfall as a person reads it: one bar for each technique, with what it saved in a shade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from estimator.result import Result, WaterfallStep
from estimator.units import gib

if TYPE_CHECKING:
    from rich.console import Console

PRICES: Final[dict[str, str]] = {
    "none": "no cost",
    "slower": "slower",
    "changes training": "changes training",
}


def write_waterfall(console: Console, result: Result) -> None:
    """Write the steps: what is needed with each, what it saved, what it is worth and costs."""
    steps = result.waterfall
    if not steps:
        return
    highest = max(step.needed_bytes + max(step.saves_bytes, 0) for step in steps) or 1
    size_width = max(len(gib(step.needed_bytes)) for step in steps)
    bar_width = max(console.width - size_width - 4, 5)
    # Imported here: the JSON path must not pay for rich.
    from rich.padding import Padding

    console.print("From naive full fine-tuning to this run: memory needed", style="bold")
    for number, step in enumerate(steps):
        console.print(f"  {number}. {step.summary}" if number else f"  {step.summary}")
        whole = round(bar_width * step.needed_bytes / highest)
        saved = round(bar_width * (step.needed_bytes + max(step.saves_bytes, 0)) / highest) - whole
        bar = "█" * max(whole, 1) + "░" * saved
        console.print(f"  {bar:{bar_width}} {gib(step.needed_bytes):>{size_width}}", no_wrap=True)
        console.print(Padding(_said(number, step), (0, 0, 0, 5)))
    console.print()


def _said(number: int, step: WaterfallStep) -> str:
    """Say in words what a step changed."""
    if not number:
        return f"peak: {step.moment} · {step.price}"
    if step.saves_bytes < 0:
        change = f"needs {gib(-step.saves_bytes)} more"
    elif step.saves_bytes:
        change = f"saves {gib(step.saves_bytes)}"
    else:
        change = "saves nothing yet"
    worth = ""
    if step.worth_bytes is not None and step.worth_bytes != step.saves_bytes:
        more = "more" if step.worth_bytes >= 0 else "less"
        worth = f" · this run without it: {gib(abs(step.worth_bytes))} {more}"
    return f"{change}{worth} · peak: {step.moment} · {PRICES[step.cost]}: {step.price}"
