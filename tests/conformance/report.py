"""Run the whole grid and write `docs/conformance.md`: `python -m tests.conformance.report`.

With a part of a name only those cases are run; `--add` behind it puts them into the page beside the
cases that are there.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from estimator.errors import EstimatorError
from tests.conformance.cases import Case, cases
from tests.conformance.compare import Comparison, compare

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
LIMIT = 0.01
MEDIAN_LIMIT = 0.001


def main(pattern: str = "", add: str = "") -> int:
    """Compare the cases whose name holds a pattern; write the page when all were run, or to add."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    chosen = [case for case in cases() if pattern in case.name]
    done: list[Comparison] = []
    failed: list[tuple[str, str]] = []
    # Fresh processes: a fork would copy torch's threads in the middle of their work.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        answers = pool.map(_compared, chosen)
        for case, found in zip(
            chosen, track(answers, "comparing engines", len(chosen), console=console), strict=True
        ):
            if isinstance(found, str):
                failed.append((case.name, found))
                continue
            done.append(found)
            if abs(found.tensor_error) > MEDIAN_LIMIT or not found.same_moment:
                console.print(_line(found), highlight=False)
    for name, reason in failed:
        console.print(f"{name}: {reason}", highlight=False)
    if not pattern:
        PAGE.write_text(page(done, failed), encoding="utf-8")
    elif add == "--add":
        ran = {case.name for case in chosen}
        others = [each for each in _on_page() if each.name not in ran]
        PAGE.write_text(page([*others, *done], failed), encoding="utf-8")
    worst = max((abs(each.error) for each in done), default=0.0)
    agree = all(each.same_moment for each in done)
    return 0 if not failed and worst <= LIMIT and agree else 1


_ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| (?P<analytic>[\d,]+) \| (?P<dry_run>[\d,]+) \| [^|]+ \| "
    r"(?P<tensors>[+-][\d.]+) % \| (?P<moment>[^|]+) \|$"
    r"|^\| (?P<refused>[^|]+) \| (?P<why>[^|]+) \|$",
    re.MULTILINE,
)


def _on_page() -> list[Comparison]:
    """Return the comparisons that the page holds, as exactly as it prints them."""
    found = []
    for row in _ROW.finditer(PAGE.read_text(encoding="utf-8")):
        if row["refused"] is not None:
            if row["refused"] not in ("case", "---"):
                reason = row["why"]
                found.append(Comparison(row["refused"], 0, 0, (0, 0), ("", ""), True, reason))
            continue
        analytic, dry_run = (int(row[side].replace(",", "")) for side in ("analytic", "dry_run"))
        tensors = (round(dry_run * (1 + float(row["tensors"]) / 100)), dry_run)
        moments = (row["moment"], row["moment"])
        found.append(Comparison(row["name"], analytic, dry_run, tensors, moments, True))
    return found


def _compared(case: Case) -> Comparison | str:
    """Return both answers to a case, or why one engine refuses what the other answers."""
    try:
        return compare(case.name, case.document)
    except EstimatorError as error:
        return str(error)


def page(done: list[Comparison], failed: list[tuple[str, str]]) -> str:
    """Return the page, worst cases first."""
    answered = sorted((each for each in done if not each.refused), key=_badness)
    errors = [abs(each.error) for each in answered]
    refused = [each for each in done if each.refused]
    within = sum(error <= LIMIT for error in errors)
    moments = sum(each.same_moment for each in answered)
    lines = [
        "# Conformance of the analytic engine",
        "",
        "Every case is answered twice: by the analytic engine, and by the dry run, which runs the",
        "real training step of transformers, PEFT, bitsandbytes and torch on fake tensors. Both",
        "predict `torch.cuda.max_memory_allocated`. Written by `make conformance`.",
        "",
        f"- cases: {len(answered)} answered by both, {len(refused)} refused by both, "
        f"{len(failed)} answered by one engine only",
        f"- within 1 %: {within} of {len(answered)}",
        f"- median error: {100 * median(errors):.4f} % (bar: 0.1 %)",
        f"- largest error: {100 * max(errors):.3f} % (bar: 1 %)",
        f"- median error of the tensors alone, without the allocator's rounding: "
        f"{100 * median(abs(each.tensor_error) for each in answered):.4f} %",
        f"- same peak moment: {moments} of {len(answered)}; two moments of the dry run that are "
        "within 0.1 % of each other count as one",
        "",
        "| case | analytic [bytes] | dry run [bytes] | error | tensors alone | peak moment |",
        "|---|---:|---:|---:|---:|---|",
        *(f"| {_line(each)} |" for each in answered),
        "",
    ]
    if refused:
        lines += ["## Refused by both engines", "", "| case | reason |", "|---|---|"]
        lines += [f"| {each.name} | {each.refused} |" for each in refused]
        lines.append("")
    if failed:
        lines += ["## Answered by one engine only", "", "| case | reason |", "|---|---|"]
        lines += [f"| {name} | {reason} |" for name, reason in failed]
        lines.append("")
    return "\n".join(lines)


def _badness(each: Comparison) -> tuple[bool, float, str]:
    return (each.same_moment, -abs(each.error), each.name)


def _line(each: Comparison) -> str:
    analytic, dry = each.moments
    moment = analytic if each.same_moment else f"{analytic} / {dry} in the dry run"
    return (
        f"{each.name} | {each.analytic:,} | {each.dry_run:,} | {100 * each.error:+.4f} % | "
        f"{100 * each.tensor_error:+.4f} % | {moment}"
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
