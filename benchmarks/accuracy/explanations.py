"""Why an estimate is off: the term or the software version, with the arithmetic.

An explanation is a rule for a source and a meter. It computes bytes from the model's shape or from
another meter of the same run, and says what error is left when they are put in. Nothing here
changes an estimate.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from benchmarks.accuracy.comparison import Comparison
from benchmarks.accuracy.meters import readings
from estimator.catalog import Access
from estimator.memory.lengths import ORDERS
from estimator.pipeline import answer, device_of, engine_for, lengths_in
from estimator.service import model_config, requested_gpu
from estimator.units import gib

NOTHING: Final = "nothing explains it yet"
FP32, HALF = 4, 2


def explanation(comparison: Comparison) -> str | None:
    """Return the first explanation that applies."""
    return next((text for each in EXPLANATIONS if (text := each(comparison))), None)


def _cast_back_by_trl(comparison: Comparison) -> str | None:
    """TRL casts what the k-bit preparation raised to fp32 back to bf16, but for the norms.

    Shapes, with V tokens in the vocabulary, h hidden and T tokens in the batch:
        embeddings, head    [V, h]  2 bytes less each
        half copy of head   [V, h]  2 bytes, which autocast makes of an fp32 head only
        first layer's input [T, h]  2 bytes less, the output of the embeddings

    Source: trl 0.13.0, trainer/utils.py, peft_module_casting_to_bf16, called by SFTTrainer.
    """
    request = comparison.run.request
    quantization = request.quantization
    prepared = quantization is not None and quantization.upcasts and quantization.prepare_kbit
    if comparison.run.row.source_group != "fms-main" or not prepared:
        return None
    if comparison.meter != "allocated":
        return None
    model = model_config(request, Access.CATALOGUE)
    spec = engine_for(request, model.config, model.id).run.spec
    matrix = spec.vocab.value * spec.hidden.value
    tokens = request.micro_batch_size * request.seq_len
    tables, copy = 2 * (FP32 - HALF) * matrix, HALF * matrix
    first_input = (FP32 - HALF) * tokens * spec.hidden.value
    less = tables + copy + first_input
    return (
        f"TRL 0.13 casts embeddings and head back to bf16: 2 x 2Vh + 2Vh (no half copy of the "
        f"head) + 2hT (first layer's input) = {gib(less)} less; with it {_left(comparison, less)}"
    )


def _compiled_by_the_script(comparison: Comparison) -> str | None:
    """The baseline compiles for any shape, with the transformers of mid-2025, between evaluations.

    Source: usamec/lowmem_finetuning at 6d8dc10f, finetune_base.py, main.
    """
    row, peak = comparison.run.row, comparison.run.result.peak
    if row.source_group != "usamec" or row.optimizer_in_backward:
        return None
    kept = peak.reserved_bytes.expected - peak.allocated_bytes.expected
    return (
        "the GPU is not named, and the script compiles for any shape with transformers 4; "
        f"{gib(kept)} of the estimate are blocks left cached"
    )


def _unknown_card(comparison: Comparison) -> str | None:
    """The source does not name its GPU, so the context is that of any."""
    row, peak = comparison.run.row, comparison.run.result.peak
    if row.source_group != "usamec":
        return None
    context = peak.device_used_bytes.expected - peak.reserved_bytes.expected
    needed = comparison.measured - peak.reserved_bytes.expected
    return (
        f"the GPU is not named: {gib(round(needed))} beside the estimated reserved memory, context "
        f"and loaded kernels among it; the estimate takes {gib(context)}"
    )


def _cache(comparison: Comparison) -> str | None:
    """The driver's figure holds the blocks that the allocator keeps, the tensors' does not."""
    if comparison.meter != "device-used":
        return None
    tensors = next(
        (value for meter, value in readings(comparison.run.row) if meter == "allocated"), None
    )
    if tensors is None:
        return None
    peak = comparison.run.result.peak
    context = peak.device_used_bytes.expected - peak.reserved_bytes.expected
    kept = comparison.measured - tensors - context
    taken = peak.reserved_bytes.expected - peak.allocated_bytes.expected
    return (
        f"blocks that the allocator keeps: {gib(round(comparison.measured))} - "
        f"{gib(round(tensors))} allocated in the same run - {gib(context)} context = "
        f"{gib(round(kept))}, {kept / tensors:.0%} of the allocated; the estimate takes "
        f"{taken / peak.allocated_bytes.expected:.0%}"
    )


_TORCHTUNE: Final = ("torchtune-docs-tutorials", "torchtune-readme-llama2-2024")
# What torchtune's Llama 2 allows: models/llama2/_model_builders.py, llama2_7b.
LONGEST: Final = 4096


def _orders_of_lengths(comparison: Comparison) -> str | None:
    """Every batch has a length of its own, and their order decides what the allocator holds."""
    row, request = comparison.run.row, comparison.run.request
    if row.source_group not in _TORCHTUNE or not request.sample_lengths:
        return None
    model = model_config(request, Access.CATALOGUE)
    engine = engine_for(request, model.config, model.id)
    device = device_of(requested_gpu(request), request)
    b, s = request.micro_batch_size, request.seq_len
    held = engine.reserved_range(b, s, device, lengths_in(request))
    same = engine.blocks(b, s, device).reserved
    place = "within" if held.low <= comparison.measured <= held.high else "outside of"
    return (
        f"the order in which batches of different lengths came decides, and is not known: {ORDERS} "
        f"random orders hold {gib(held.low)} to {gib(held.high)}, batches of {s} tokens alone "
        f"{gib(same)}; the reading lies {place} that"
    )


def _unstated_batch(comparison: Comparison) -> str | None:
    """torchao's table names neither the batch nor checkpointing; both are torchtune's defaults.

    Source: torchao at 1e7f132e3, prototype/low_bit_optim/README.md; torchtune at 52d1b838,
    recipes/configs/llama2/7B_full_low_memory.yaml.
    """
    row, request = comparison.run.row, comparison.run.request
    if row.source_group != "torchao-docs":
        return None
    model = model_config(request, Access.CATALOGUE)

    def tokens(rows: int, checkpointing: str) -> int:
        """Return at how many tokens of a batch the estimate is the reading."""
        alike = replace(request, sample_lengths=())
        other = replace(alike, micro_batch_size=rows, activation_checkpointing=checkpointing)

        def allocated(length: int) -> int:
            longer = answer(replace(other, seq_len=length), model.config, model.id, None)
            return longer.peak.allocated_bytes.expected

        lengths = range(1, LONGEST)
        return rows * lengths[bisect_right(lengths, comparison.measured, key=allocated) - 1]

    return (
        f"neither the batch nor checkpointing is stated: with {tokens(8, 'full')} tokens in a "
        f"batch, or {tokens(2, 'none')} without checkpointing, the estimate is the reading"
    )


def _full_card(comparison: Comparison) -> str | None:
    """The optimizer's paged states fill what the card has left."""
    row = comparison.run.row
    if row.source_group not in _TORCHTUNE or not row.suspect:
        return None
    return "the card is full: paged states of the optimizer come and go in what it has left"


def _left(comparison: Comparison, less: int) -> str:
    return f"{(comparison.estimated.expected - less) / comparison.measured - 1:+.2%}"


EXPLANATIONS: Final[tuple[Callable[[Comparison], str | None], ...]] = (
    _cast_back_by_trl,
    _compiled_by_the_script,
    _unknown_card,
    _cache,
    _full_card,
    _unstated_batch,
    _orders_of_lengths,
)
