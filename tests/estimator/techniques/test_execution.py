"""Forms of checkpointing, against transformers' own choice of layers and against papers."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.eager.tensor import Regime
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.memory.trace import Trace, trace
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from estimator.techniques.execution import parse_checkpointing

GPT2 = {
    "model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12,
    "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100,
}  # fmt: skip
INNER_LAYER = 2
ROWS_TIMES_LENGTH_SQUARED = 5


def _trace(config: dict[str, Any], **fields: Any) -> Trace:
    request = parse_request({"model": {"config": config}, **fields})
    return trace(resolve(request, config, "model"), Regime())


def _saved(seen: Trace, monomial: int) -> int:
    return sum(
        seen.kinds[kind].size[0] * count
        for kind, count in seen.backward_saved.items()
        if seen.kinds[kind].site == INNER_LAYER and seen.kinds[kind].size[1] == monomial
    )


@pytest.mark.parametrize(("kind", "per_head"), [("none", 5), ("selective_attention", 0)])
def test_selective_recomputation_saves_the_5_a_s_s_b_of_korthikanti(kind: str, per_head: int):
    """Section 4.1, attention block: 2as²b softmax output, as²b mask, 2as²b dropout output."""
    seen = _trace(GPT2, activation_checkpointing=kind, attention="eager")
    assert _saved(seen, ROWS_TIMES_LENGTH_SQUARED) == per_head * 12


@pytest.mark.parametrize("every", [1, 2, 3, 5, 9])
def test_the_checkpointed_layers_are_those_that_transformers_marks(every: int):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.CONFIG_MAPPING["llama"].from_dict(dict(LLAMA))
        )
    model.activation_checkpointing_enable(every_n_layers=every)
    request = parse_request(
        {"model": {"config": LLAMA}, "activation_checkpointing": f"every_{every}"}
    )
    spec = resolve(request, LLAMA, "model").spec
    marked = [spec.kinds[index].checkpointed for index in spec.pattern]
    assert marked == [layer.gradient_checkpointing for layer in model.model.layers]


def test_offloading_moves_layers_x_sequence_x_hidden_to_the_host():
    """transformers, activation_checkpointing_enable: `layers x sequence x hidden` bytes, twice."""
    asked = {"model": "meta-llama/Llama-3.1-8B", "seq_len": 4096}
    kept = estimate({**asked, "activation_checkpointing": "full"})
    moved = estimate({**asked, "activation_checkpointing": "offload"})
    moved_bytes = 2 * 32 * 4096 * 4096
    assert moved.peak.host_bytes.expected == moved_bytes
    forward = [
        next(each.bytes for each in result.timeline if each.moment == "loss forward")
        for result in (kept, moved)
    ]
    assert forward[0] - forward[1] == pytest.approx(moved_bytes, rel=0.01)


def test_pinned_blocks_are_powers_of_two():
    """CachingHostAllocator.h rounds up to them: 3 x 1000 x 4096 x 2 bytes are 32 MiB."""
    asked = {"model": "meta-llama/Llama-3.1-8B", "micro_batch_size": 3, "seq_len": 1000}
    result = estimate({**asked, "activation_checkpointing": "offload"})
    assert result.peak.host_bytes.expected == 32 * 32 * 1024**2


@pytest.mark.parametrize("text", ["every_0", "every_", "offload_full", "selective", "every_2_2"])
def test_a_kind_that_there_is_not_is_refused_with_those_that_there_are(text: str):
    with pytest.raises(UnsupportedCombinationError, match="known: none, full"):
        parse_checkpointing(text)


@pytest.mark.parametrize("config", [{"model_type": "bloom"}, {"model_type": "falcon"}])
def test_attention_alone_is_refused_where_it_is_no_function_of_its_own(config: dict[str, Any]):
    full = {"n_layer": 2, "num_hidden_layers": 2, "vocab_size": 100, **config}
    full |= {"hidden_size": 64, "n_head": 4, "num_attention_heads": 4}
    with pytest.raises(UnsupportedCombinationError, match="no function of its own"):
        _trace(full, activation_checkpointing="selective_attention")


def test_packed_sequences_with_sdpa_cost_a_mask_of_all_tokens_squared():
    """transformers, sdpa_mask: [1, 1, t, t] of booleans; the kernel's copy is two bytes wide."""
    asked = {"model": "meta-llama/Llama-3.1-8B", "micro_batch_size": 4, "seq_len": 1024}
    forward = [
        next(
            each.bytes
            for each in estimate({**asked, "packing": packed, "attention": attention}).timeline
            if each.moment == "loss forward"
        )
        for packed, attention in ((True, "sdpa"), (True, "flash_attention_2"))
    ]
    masks = 4096 * 4096 * (2 * 32)
    repeated_heads = 32 * 4096 * 2 * 2 * (4096 - 1024)
    # All layers keep the mask as the kernel takes it, and keys and values of every query head.
    assert forward[0] - forward[1] == pytest.approx(masks + repeated_heads, rel=0.01)


def test_packed_and_padded_sequences_contradict_each_other():
    with pytest.raises(InvalidRequestError, match="padding or packing"):
        _trace(LLAMA, packing=True, padding=True)


def test_a_packed_row_needs_positions_up_to_one_sequence_only():
    asked = {"model": {"config": GPT2}, "micro_batch_size": 4, "seq_len": 1024, "packing": True}
    assert estimate(asked).peak.allocated_bytes.expected > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "sdpa_efficient"}, "4 query heads for each key head"),
        ({"attention": "sdpa_flash", "precision": "fp32"}, "fp32"),
        ({"attention": "sdpa_flash", "padding": True}, "a mask"),
        ({"attention": "sdpa_cudnn", "padding": True}, "a mask"),
    ],
)
def test_a_kernel_that_does_not_take_the_inputs_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(UnsupportedCombinationError, match=said):
        estimate({"model": "meta-llama/Llama-3.1-8B", **changes})


@pytest.mark.parametrize("model_type", ["bloom", "gemma2"])
def test_kernels_of_sdpa_are_refused_where_there_is_no_sdpa(model_type: str):
    model = {"bloom": "bigscience/bloom-560m", "gemma2": "google/gemma-2-2b"}[model_type]
    with pytest.raises(UnsupportedCombinationError, match="use sdpa or eager"):
        estimate({"model": model, "attention": "sdpa_flash"})


def test_flash_attention_3_works_in_the_buffers_of_its_host_code():
    """hopper/flash_api.cpp, mha_bwd, for 16 heads of width 80, 4 of them keys, in fp32.

    dq_accum 16 x 96, dk_accum and dv_accum 4 x 96, softmax_d and softmax_lse_log2 16 each.
    """
    config = {**LLAMA, "hidden_size": 1280, "num_attention_heads": 16, "num_key_value_heads": 4}
    seen = _trace(config, attention="flash_attention_3")
    buffers = {
        kind.name.rpartition(": ")[2]: kind.size[0]
        for kind in seen.kinds
        if kind.component == "workspace" and kind.site == INNER_LAYER
    }
    assert buffers == {
        "dq_accum": 6144,
        "dk_accum": 1536,
        "dv_accum": 1536,
        "softmax_d": 64,
        "softmax_lse_log2": 64,
    }


def test_flex_attention_keeps_no_mask_and_sums_no_gradient_in_fp32():
    """torch 2.13, flex_attention_backward: beside the gradients, delta alone, 4 bytes a row."""
    seen = _trace(LLAMA, attention="flex_attention", padding=True)
    buffers = {
        kind.name.rpartition(": ")[2]: kind.size[0]
        for kind in seen.kinds
        if kind.component == "workspace" and kind.site == INNER_LAYER
    }
    assert buffers == {"delta": 4 * 4}
    assert _saved(seen, ROWS_TIMES_LENGTH_SQUARED) == 0


@pytest.mark.parametrize(
    "changes", [{"precision": "amp_bf16"}, {"model": {"config": GPT2}}], ids=["autocast", "gpt2"]
)
def test_flex_attention_is_refused_where_nobody_runs_it(changes: dict[str, Any]):
    asked = {"model": {"config": LLAMA}, "seq_len": 512, "attention": "flex_attention"}
    with pytest.raises(UnsupportedCombinationError, match="flex_attention"):
        estimate({**asked, **changes})
