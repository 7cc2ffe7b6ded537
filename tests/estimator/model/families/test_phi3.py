"""Phi-3: bytes that the dry run of the real class shows, and the names of its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.model.families import read_spec

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels and the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "pad_token_id": 0,
}
# Rotary positions on part of each head as Phi-4-mini, dropout, and a length that reaches a window.
PARTIAL = {
    **CONFIG,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.1,
    "attention_dropout": 0.1,
    "sliding_window": 512,
}

# Traced by `profiler.engine.trace`: Phi3ForCausalLM of transformers 5.23.0 under torch 2.13.0,
# two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of loss
# forward and of backward.
# FlashAttention's output lies in memory as the query does, so that behind the rotary positions' cat
# it is copied (flash_attn/flash_api.cpp, mha_fwd: `out = at::empty_like(q_padded)`).
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 67_476_404, 61_922_724),
    ({"precision": "fp32"}, 135_603_564, 133_563_740),
    ({"precision": "amp_bf16"}, 93_615_540, 86_489_508),
    ({"attention": "eager"}, 102_816_620, 97_262_940),
    ({"padding": True}, 68_262_764, 62_709_084),
    ({"activation_checkpointing": "full"}, 30_444_396, 37_139_828),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 55_010_668, 59_611_508),
    ({"method": {"name": "lora", "r": 8}}, 62_412_736, 58_310_576),
    (
        {"method": {"name": "lora", "r": 8}, "activation_checkpointing": "full"},
        20_141_944,
        33_597_312,
    ),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 65_117_108, 61_611_428),
]
TRACED_PARTIAL: list[tuple[dict[str, Any], int, int]] = [
    ({}, 69_802_796, 64_249_116),
    ({"precision": "fp32"}, 118_285_612, 116_245_788),
    ({"precision": "amp_bf16"}, 95_909_164, 88_783_132),
    ({"attention": "eager"}, 110_648_108, 105_094_428),
    ({"precision": "amp_bf16", "attention": "eager"}, 136_754_476, 129_628_444),
    ({"padding": True}, 69_802_796, 64_249_116),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 55_469_356, 60_594_460),
    ({"method": {"name": "lora", "r": 8}}, 66_311_992, 61_947_688),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 71_375_684, 67_870_004),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_PARTIAL)
def test_the_peaks_with_dropout_and_partial_positions_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(PARTIAL, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


def test_the_tensors_of_a_layer_are_those_of_transformers() -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(**CONFIG))
    theirs = {name: tuple(each.shape) for name, each in model.model.layers[0].named_parameters()}
    (kind,) = read_spec(CONFIG, "model").kinds
    ours = {
        f"{module.name}.{weight.name}": tuple(each.value for each in weight.shape)
        for module in kind.modules
        for weight in module.weights()
    }
    assert ours == theirs
