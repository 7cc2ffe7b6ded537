"""Compiled models: what is kept, how wide the answer is, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.result import Result

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32_000,
    "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
COMPILED: dict[str, Any] = {
    "kernels": ["compile"], "micro_batch_size": 3, "seq_len": 1000, "optimizer": "adamw_torch",
}  # fmt: skip
LORA: dict[str, Any] = {"method": {"name": "lora", "r": 12}}


def _answer(config: dict[str, Any] = LLAMA, **recipe: Any) -> Result:
    request = parse_request({"model": {"config": config}, **COMPILED, **recipe})
    return answer(request, config, "model", None)


@pytest.mark.parametrize(
    ("recipe", "dry_run"),
    [
        ({}, 1_507_799_940),
        ({"precision": "amp_bf16"}, 2_273_991_556),
        ({"padding": True}, 1_507_799_940),
        ({"gradient_accumulation_steps": 2}, 1_706_591_432),
        (LORA, 1_233_352_996),
        ({**LORA, "autocast": "bf16"}, 1_127_091_940),
    ],
    ids=[
        "full",
        "amp",
        "padded",
        "accumulation",
        "lora",
        "lora autocast",
    ],
)
def test_the_tensors_of_the_peak_are_those_of_the_code_that_inductor_writes(recipe, dry_run):
    # Dry run with torch 2.13.0 and transformers 5.23.0; requested bytes, without block rounding.
    found = _answer(**recipe)
    rounding = sum(
        row.bytes for part in found.breakdown for row in part.rows
        if row.name == "allocator rounding"
    )  # fmt: skip
    expected = found.peak.allocated_bytes.expected - rounding
    assert expected == pytest.approx(dry_run, rel=2e-4)


# A small vocabulary, so that the layers are the peak and not the loss.
LAYERS: dict[str, Any] = {**LLAMA, "intermediate_size": 3072, "vocab_size": 2003}
PADDED: dict[str, Any] = {
    **LAYERS, "hidden_size": 1152, "intermediate_size": 3016, "num_attention_heads": 18,
    "num_key_value_heads": 6,
}  # fmt: skip
NO_GROUPS: dict[str, Any] = {**LAYERS, "intermediate_size": 2816, "num_key_value_heads": 16}
QWEN2: dict[str, Any] = {
    **LAYERS, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    **LAYERS, "model_type": "qwen3", "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 128,
}  # fmt: skip
TIED: dict[str, Any] = {
    **LLAMA, "intermediate_size": 3016, "vocab_size": 20_003, "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def _tensors(config: dict[str, Any], **recipe: Any) -> int:
    """Return the bytes of the peak without the allocator's rounding."""
    found = _answer(config, **recipe)
    rows = [row for part in found.breakdown for row in part.rows]
    rounding = sum(row.bytes for row in rows if row.name == "allocator rounding")
    return found.peak.allocated_bytes.expected - rounding


@pytest.mark.parametrize(
    ("config", "recipe", "dry_run", "within"),
    [
        (LAYERS, {}, 556_108_424, 1e-3),
        (LAYERS, {"precision": "amp_bf16"}, 835_787_400, 1e-3),
        (PADDED, {}, 622_949_368, 1e-3),
        (NO_GROUPS, {}, 565_656_200, 1e-3),
        (QWEN2, {}, 608_659_656, 5e-3),
        (QWEN3, {}, 545_837_864, 8e-3),
    ],
    ids=["rows unpadded", "amp", "rows padded", "no grouped heads", "qwen2", "qwen3"],
)
def test_a_checkpointed_layer_is_computed_again_in_the_order_of_the_scheduler(
    config, recipe, dry_run, within
):
    # Dry run with torch 2.13.0 and transformers 5.23.0; requested bytes, without block rounding.
    found = _tensors(config, activation_checkpointing="full", **recipe)
    assert found == pytest.approx(dry_run, rel=within)


def test_reentrant_checkpointing_is_the_same_inside_a_compiled_graph():
    plain = _answer(LAYERS, activation_checkpointing="full_nonreentrant")
    reentrant = _answer(LAYERS, activation_checkpointing="full_reentrant")
    # The eager step, from which the high end comes, tells the two apart.
    assert reentrant.peak.allocated_bytes.expected == plain.peak.allocated_bytes.expected
    assert reentrant.peak.allocated_bytes.low == plain.peak.allocated_bytes.low


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_both_gradients_of_a_tied_table_stand_beside_their_sum(checkpointing):
    # Dry run, as above; both kinds have their peak at the end of backward.
    found = _tensors(TIED, activation_checkpointing=checkpointing, micro_batch_size=1, seq_len=300)
    assert found == pytest.approx(465_703_662, rel=2e-3)


def test_the_high_end_is_never_below_the_eager_step():
    compiled, eager = _answer(), _answer(kernels=[])
    for quantity in ("allocated_bytes", "reserved_bytes", "device_used_bytes", "needed_bytes"):
        narrow, wide = getattr(eager.peak, quantity), getattr(compiled.peak, quantity)
        assert wide.low <= wide.expected <= wide.high
        assert wide.high >= narrow.high
    assert compiled.peak.needed_bytes.expected < eager.peak.needed_bytes.expected
    assert any("eager step" in reason for reason in compiled.assumptions)


def test_the_verdict_uses_the_high_end():
    compiled, eager = _answer(), _answer(kernels=[])
    between = (compiled.peak.needed_bytes.expected + eager.peak.needed_bytes.low) // 2
    assert compiled.peak.needed_bytes.expected < between < eager.peak.needed_bytes.low
    verdict = _answer(hardware={"memory_bytes": between}).verdict
    assert verdict == "tight"


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"attention": "flash_attention_2"}, "attention other than sdpa"),
        ({"packing": True}, "packing"),
        ({"kernels": ["compile", "liger"]}, "other kernels"),
        ({"loss": "cut_cross_entropy"}, "loss"),
        ({"software": {"framework": "transformers", "version": "4"}}, "framework"),
        ({"method": {"name": "lora", "lora_dropout": 0.1}}, "LoRA without dropout"),
        ({"method": {"name": "lora", "use_dora": True}}, "LoRA without dropout"),
        ({"method": {"name": "ia3"}}, "LoRA without dropout"),
        ({"method": {"name": "lora", "target_modules": ["q_proj"]}}, "all linear layers"),
        ({"method": {"name": "lora", "adapter_dtype": "base"}}, "all linear layers"),
        ({**LORA, "precision": "fp32"}, "LoRA over fp32 weights"),
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "amp_fp16"}, "fp16"),
        ({"precision": "master_bf16"}, "master copies"),
        ({"autocast": "bf16"}, "under autocast"),
        ({**LORA, "quantization": {"name": "nf4"}}, "quantization"),
        ({"activation_checkpointing": "every_2"}, "activation checkpointing other than full"),
        ({"activation_checkpointing": "selective_op"}, "activation checkpointing other than full"),
        ({"activation_checkpointing": "offload"}, "activation checkpointing other than full"),
        ({**LORA, "activation_checkpointing": "full"}, "activation checkpointing of LoRA"),
        ({"optimizer": {"name": "adamw", "in_backward": True}}, "optimizer in backward"),
        ({"loop": {"set_to_none": False}}, "gradients that stand"),
    ],
)
def test_what_was_never_compared_is_refused_by_name(recipe, named):
    with pytest.raises(UnsupportedCombinationError, match=named):
        _answer(**recipe)


def test_a_family_is_answered_as_far_as_it_was_compared():
    qwen3 = {**LLAMA, "model_type": "qwen3", "head_dim": 128}
    found = _answer(qwen3)
    # Dry run, as above; allocated bytes.
    assert found.peak.allocated_bytes.expected == pytest.approx(1_690_143_744, rel=5e-3)
    qwen2 = {**LLAMA, "model_type": "qwen2"}
    with pytest.raises(UnsupportedCombinationError, match="full bf16 training of qwen2"):
        _answer(qwen2, precision="amp_bf16")


def test_other_families_are_refused_by_name():
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 500,
        "n_positions": 128,
    }
    with pytest.raises(UnsupportedCombinationError, match=r"gpt2 models .*llama"):
        _answer(gpt2, seq_len=100)


@pytest.mark.parametrize("mode", ["compile_max_autotune", "compile_reduce_overhead"])
def test_modes_that_record_graphs_widen_the_high_end_by_the_optimizers_step(mode):
    default, recorded = _answer(), _answer(kernels=[mode])
    assert recorded.peak.needed_bytes.expected == default.peak.needed_bytes.expected
    assert recorded.peak.needed_bytes.low == default.peak.needed_bytes.low
    # foreach AdamW holds a square root of each second moment, in the weights' two bytes; the
    # batch is let go, and the norms, 7 vectors of 1024, are a group of their own.
    more = recorded.peak.needed_bytes.high - default.peak.needed_bytes.high
    matrices = default.parameters.trainable - 7 * 1024
    assert more == pytest.approx(2 * matrices, rel=1e-3)
    assert recorded.peak.reserved_bytes.high - default.peak.reserved_bytes.high == more
    assert any("CUDA graphs" in reason for reason in recorded.assumptions)


def test_a_mode_that_torch_does_not_have_is_refused_by_name():
    with pytest.raises(UnsupportedCombinationError, match="compile_faster"):
        _answer(kernels=["compile_faster"])
