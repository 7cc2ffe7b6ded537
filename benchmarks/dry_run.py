"""Time and memory of the dry run as a whole process: `python -m benchmarks.dry_run`.

Each recipe runs in a process of its own, from start to exit, so that imports count and the peak of
resident memory is the process's own.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

PAGE: Final = Path(__file__).parents[1] / "docs" / "performance-dry-run.md"
RUNS: Final = 3
CASES: Final[dict[str, list[str]]] = {
    "Llama-3.1-8B, full, bf16": ["--model", "meta-llama/Llama-3.1-8B"],
    "Llama-3.1-8B, LoRA, checkpointed": [
        "--model", "meta-llama/Llama-3.1-8B", "--method", "lora",
        "--activation-checkpointing", "full",
    ],
    "Llama-3.1-70B, full, bf16": ["--model", "meta-llama/Llama-3.1-70B"],
}  # fmt: skip


def main() -> None:
    """Run every recipe and write the page."""
    rows = [(name, *_measured(arguments)) for name, arguments in CASES.items()]
    PAGE.write_text(_page(rows), encoding="utf-8")


def _measured(arguments: list[str]) -> tuple[float, int]:
    """Return the median wall time [s] and the largest resident memory [bytes] of some runs."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        command = [sys.executable, "-m", "estimator", "dry-run", *arguments, "--json"]
        subprocess.run(  # noqa: S603 - our own command, with arguments from the table above
            command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        seconds.append(time.perf_counter() - started)
    # Linux counts in KiB, and keeps the largest child so far.
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return median(seconds), largest


def _page(rows: list[tuple[str, float, int]]) -> str:
    machine = f"{os.cpu_count()} {platform.machine()} cores, {platform.system()}"
    lines = [
        "# Performance of the dry run",
        "",
        "Written by `python -m benchmarks.dry_run`: whole processes, from start to exit, on a",
        f"machine that may have been shared: {machine}, CPython {platform.python_version()}.",
        f"Times are medians of {RUNS} runs; memory is the largest resident set of any run so far.",
        "",
        "| run | wall | resident memory | bars for 8 B |",
        "|---|---:|---:|---|",
    ]
    lines += [
        f"| {name} | {seconds:.1f} s | {memory / 2**20:.0f} MiB | 15 s, 2048 MiB |"
        for name, seconds, memory in rows
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
