"""The page `docs/accuracy.md`, written from the published rows and our answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import ceil
from statistics import fmean, median
from typing import Final

from benchmarks.accuracy.comparison import Answered, Answers, Comparison, answers, comparisons
from benchmarks.accuracy.explanations import NOTHING, explanation
from benchmarks.accuracy.published import ROOT, Row, measured, out_of_memory
from estimator.request import EstimateRequest
from estimator.techniques.methods.lora import Lora
from estimator.units import GiB, gib

PAGE: Final = ROOT / "docs" / "accuracy.md"
# Beyond the first an error must be explained; beyond the second a known reason is told.
TOLERANCE: Final = 0.05
WORTH_TELLING: Final = 0.01

INTRODUCTION: Final = """\
# Accuracy against published measurements

Written by `python -m benchmarks.accuracy`; a test fails when this page is out of date. The
measurements and what is known about them are in [data/published](../data/published/README.md).

Every published row that the request document can express is estimated with the software that its
source used, and each meter is compared with the same quantity of the answer:
`max_memory_allocated` with allocated bytes, `max_memory_reserved` with reserved bytes, nvidia-smi
with device memory in use. How a row becomes a request is in `benchmarks/accuracy/recipes.py`, one
rule for a source. No constant of the estimator is fitted to a row.
"""

_UPPER_BOUND: Final = (
    "Lengths are those of the longest sample of Alpaca, an upper bound: a batch is padded to its\n"
    "own longest sample, and how many batches were run is not stated. Only the row with 4 x 2048\n"
    "tokens names its length.\n"
)

# What is known about a whole source.
REMARKS: Final = {
    "torchtune-docs-tutorials": (
        f"{_UPPER_BOUND}The four LoRA rows draw their samples in one order, and meet the reading\n"
        "at 900 to 1000 tokens, roughly.\n"
    ),
    "torchtune-readme-llama2-2024": _UPPER_BOUND,
    "torchao-docs": (
        "One epoch of Alpaca with torchtune of September 2024. Batch and checkpointing are those\n"
        "of its configuration, and the longest sample is that of litgpt's tables.\n"
    ),
    "ms-swift": (
        "The samples of this data set have 91 tokens up to the length given, and the meter reads\n"
        "what the allocator holds. The excess shrinks where the card is nearly full (Yi-34B), and\n"
        "Yi-6B has the same vocabulary and smaller layers: a tensor missed in the loss or in a\n"
        "layer would make it grow. Blocks kept from samples of other lengths would look like\n"
        "this, but no figure of the source can confirm it.\n"
    ),
}


def render() -> str:
    """Return the whole page."""
    rows, failures = answers(measured()), answers(out_of_memory())
    found = comparisons(rows.answered)
    sections = (
        INTRODUCTION,
        *_summary(found),
        *_measurements(found),
        *_inexpressible(rows),
        *_verdicts(rows, failures),
    )
    return "\n".join(sections).rstrip() + "\n"


# -- summary -----------------------------------------------------------------------------------


def scored(found: Iterable[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """Return the comparisons that count, by source group and meter."""
    counted = [each for each in found if each.run.row.scored]
    keys = dict.fromkeys((each.run.row.source_group, each.meter) for each in counted)
    return {
        key: [each for each in counted if (each.run.row.source_group, each.meter) == key]
        for key in keys
    }


def nearest_rank(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed.

    Example:
        >>> nearest_rank([1.0, 2.0, 3.0, 4.0], 0.5)
        2.0
    """
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def _summary(found: Sequence[Comparison]) -> Iterator[str]:
    yield "## Summary\n"
    yield (
        "Counted are peaks of completeness 2 or 3 that are not suspect, one meter at a time. Bias\n"
        "is the mean signed error; the 90th percentile is by nearest rank; inside are\n"
        "measurements between the low and the high end of the answer.\n"
    )
    yield (
        "| source | meter | rows | median error | 90th percentile | worst | bias | beyond 5 % "
        "| inside |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for (group, meter), each in scored(found).items():
        errors = [comparison.error for comparison in each]
        sizes = [abs(error) for error in errors]
        worst = max(errors, key=abs)
        yield (
            f"| {group} | {meter} | {len(each)} | {median(sizes):.2%} | "
            f"{nearest_rank(sizes, 0.9):.2%} | {worst:+.2%} | {fmean(errors):+.2%} | "
            f"{sum(size > TOLERANCE for size in sizes)} | {sum(one.inside for one in each)} |"
        )
    yield ""


# -- one row for each measurement --------------------------------------------------------------


def _measurements(found: Sequence[Comparison]) -> Iterator[str]:
    yield "## Measurements\n"
    yield (
        "Sizes in GiB. A row in brackets does not count: its source leaves more than one thing\n"
        "open. The last column speaks where an error is beyond 5 %, and where a reason is known\n"
        "for one beyond 1 %.\n"
    )
    for group, each in groupby(found, key=lambda comparison: comparison.run.row.source_group):
        yield f"### {group}\n"
        if group in REMARKS:
            yield REMARKS[group]
        yield "| id | model | recipe | meter | measured | estimated | error | why |"
        yield "|---|---|---|---|---:|---:|---:|---|"
        for comparison in sorted(each, key=lambda one: one.meter):
            yield _measurement(comparison)
        yield ""


def _measurement(comparison: Comparison) -> str:
    run = comparison.run
    name = run.row.id if run.row.scored else f"({run.row.id})"
    return (
        f"| {name} | {run.row.model} | {recipe(run.request)} | {comparison.meter} | "
        f"{comparison.measured / GiB:.2f} | {comparison.estimated.expected / GiB:.2f} | "
        f"{comparison.error:+.2%} | {why(comparison)} |"
    )


def why(comparison: Comparison) -> str:
    """Return what explains a comparison's error, as far as it needs explaining."""
    if abs(comparison.error) <= WORTH_TELLING:
        return ""
    text = explanation(comparison)
    if text is None and abs(comparison.error) > TOLERANCE:
        return NOTHING
    return text or ""


def recipe(request: EstimateRequest) -> str:
    """Return the recipe of a request in a few words."""
    method, quantization = request.method, request.quantization
    name = method.name
    if isinstance(method, Lora):
        name = f"LoRA r={method.r}"
        if quantization is not None:
            name = f"Q{name}" if quantization.upcasts else f"{name} over {quantization.name}"
    raised = quantization is not None and quantization.upcasts and quantization.prepare_kbit
    prepared = ", k-bit preparation" if raised else ""
    precision = request.precision + (f" + autocast {request.autocast}" if request.autocast else "")
    optimizer = f"{request.optimizer.name} {request.optimizer.implementation or ''}".strip()
    return (
        f"{name}{prepared}, {precision}, {optimizer}, "
        f"{request.micro_batch_size} x {request.seq_len}, "
        f"checkpointing {request.activation_checkpointing}, {request.attention}, "
        f"{''.join(f'{each} kernels, ' for each in request.kernels)}"
        f"{request.software.framework} {request.software.version}"
    )


# -- what cannot be expressed, and what failed -------------------------------------------------


def _inexpressible(rows: Answers) -> Iterator[str]:
    total = len(rows.answered) + len(rows.refused)
    yield "## Rows that this version cannot express\n"
    yield f"{len(rows.refused)} of {total} rows, each under the first reason that applies.\n"
    yield from _reasons(rows)


def _reasons(rows: Answers) -> Iterator[str]:
    yield "| reason | rows | sources |"
    yield "|---|---:|---|"
    for reason, each in rows.reasons.items():
        yield f"| {reason} | {len(each)} | {_sources(each)} |"
    yield ""


def _sources(rows: Iterable[Row]) -> str:
    counts = Counter(row.source_group for row in rows)
    return ", ".join(f"{group} ({count})" for group, count in sorted(counts.items()))


def _verdicts(rows: Answers, failures: Answers) -> Iterator[str]:
    false_fits = sum(each.result.verdict == "fits" for each in failures.answered)
    judged = [each for each in rows.answered if each.result.verdict != "unknown"]
    false_refusals = sum(each.result.verdict == "does_not_fit" for each in judged)
    total = len(failures.answered) + len(failures.refused)
    yield "## Verdicts\n"
    yield (
        f"- Runs that were published as not fitting: {len(failures.answered)} of {total} can be\n"
        f"  expressed; {false_fits} of them are said to fit.\n"
        f"- Measured runs on a card of the catalogue: {len(judged)}; {false_refusals} of them are "
        "said not to fit.\n"
    )
    yield "| id | model | recipe | GPU | needs | offers | verdict |"
    yield "|---|---|---|---|---:|---:|---|"
    for each in failures.answered:
        yield _failure(each)
    yield ""
    yield "Failed runs that this version cannot express:\n"
    yield from _reasons(failures)


def _failure(run: Answered) -> str:
    needed, usable = run.result.peak.needed_bytes, run.result.capacity.usable_bytes
    offers = gib(usable) if usable is not None else "not known"
    return (
        f"| {run.row.id} | {run.row.model} | {recipe(run.request)} | {run.row.gpu} | "
        f"{gib(needed.low)} to {gib(needed.high)} | {offers} | {run.result.verdict} |"
    )
