"""The published rows one by one: what was measured, what we say, and why the two differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from benchmarks.accuracy.comparison import Answered, Answers, Comparison
from benchmarks.accuracy.explanations import NOTHING, explanation
from benchmarks.accuracy.published import Row
from estimator.request import EstimateRequest
from estimator.techniques.methods.lora import Lora
from estimator.units import GiB, gib

# Beyond the first an error must be explained; beyond the second a known reason is told.
TOLERANCE: Final = 0.05
WORTH_TELLING: Final = 0.01

_ORDERS: Final = (
    "Batches have lengths of their own, and each that is longer than all before makes the\n"
    "allocator hold more, so that the order counts. The lengths are those of a part of the data\n"
    "(data/published/sample_lengths.json), the order is drawn; which one was run is not known.\n"
    "So the middle of those that are drawn is itself uncertain.\n"
)

# What is known about a whole source.
REMARKS: Final = {
    "torchtune-docs-tutorials": (
        "torchtune cut Alpaca's samples to 512 tokens from 30 March 2024 on (#620), which is the\n"
        f"longest batch of an epoch. {_ORDERS}"
    ),
    "torchtune-readme-llama2-2024": (
        "How many batches were run is not stated; the longest sample that is known is taken for\n"
        "the longest batch. From 30 March 2024 on samples are cut to 512 tokens (#620); the rows\n"
        f"of May name theirs. {_ORDERS}"
    ),
    "torchao-docs": (
        "One epoch of Alpaca with torchtune of September 2024. The table names neither the batch\n"
        "nor checkpointing (it points to a thread, #812, of which we have the beginning only):\n"
        "both are those of torchtune's configuration, 2 samples and on. Scales of 8-bit states\n"
        "are for 2048 values each, as they were that month. All four rows are low by 1.1 to\n"
        "1.3 GiB, whatever the optimizer keeps. torchtune's own code of that commit, on fake\n"
        "tensors, allocates what is estimated here (data/measurements/torchtune.json), and what\n"
        "was posted for 4 x 2048 tokens, 20.2 GB (#961), is estimated as 20.17: no tensor is\n"
        "known to be missing. The batch is in doubt: 2 padded samples have 324 tokens on average\n"
        "(lengths.ipynb of alpaca-lora), and 3200 tokens/s, the table's speed of AdamW, which\n"
        "moves 14 bytes a parameter at 2.04 TB/s, leave 55 ms for 17.1 TFLOP with checkpointing:\n"
        "311 of the 312 TFLOP/s of an A100. So the batch was another one: 6 samples of 1304\n"
        "tokens with checkpointing would agree with all four rows within 0.3 %. Nothing says so,\n"
        "and a batch that is chosen because it agrees proves nothing: none is put in its place.\n"
    ),
    "ms-swift": (
        "The samples of this data set have 91 tokens up to the length given, and the meter reads\n"
        "what the allocator holds. The excess shrinks where the card is nearly full (Yi-34B), and\n"
        "Yi-6B has the same vocabulary and smaller layers: a tensor missed in the loss or in a\n"
        "layer would make it grow. Blocks kept from samples of other lengths would look like\n"
        "this, but no figure of the source can confirm it.\n"
    ),
}


# -- one row for each measurement --------------------------------------------------------------


def measurements(found: Sequence[Comparison]) -> Iterator[str]:
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


def inexpressible(rows: Answers) -> Iterator[str]:
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


def failed(failures: Answers) -> Iterator[str]:
    """Yield the runs that were published as not fitting, one by one."""
    total = len(failures.answered) + len(failures.refused)
    yield "### Runs that were published as not fitting\n"
    yield f"{len(failures.answered)} of {total} can be expressed.\n"
    yield "| id | model | recipe | GPU | needs | offers | verdict |"
    yield "|---|---|---|---|---:|---:|---|"
    for each in failures.answered:
        yield _failure(each)
    yield ""
    yield "The others:\n"
    yield from _reasons(failures)


def _failure(run: Answered) -> str:
    needed, usable = run.result.peak.needed_bytes, run.result.capacity.usable_bytes
    offers = gib(usable) if usable is not None else "not known"
    return (
        f"| {run.row.id} | {run.row.model} | {recipe(run.request)} | {run.row.gpu} | "
        f"{gib(needed.low)} to {gib(needed.high)} | {offers} | {run.result.verdict} |"
    )
