"""Gemma: bytes that the dry run of the real class shows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import UnsupportedModelError
from estimator.model.families import read_spec

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels and the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
}

# Traced by `profiler.engine.trace`: GemmaForCausalLM of transformers 5.23.0 under torch 2.13.0,
# two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of loss
# forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 74_074_326, 67_995_334),
    ({"precision": "fp32"}, 152_461_968, 150_422_144),
    ({"precision": "amp_bf16"}, 104_575_704, 97_448_648),
    ({"attention": "eager"}, 114_919_566, 108_840_574),
    ({"precision": "amp_bf16", "attention": "eager"}, 145_420_944, 138_293_888),
    ({"attention": "flash_attention_2"}, 74_074_302, 67_995_310),
    ({"padding": True}, 80_365_710, 74_286_718),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 60_459_664, 67_682_968),
    ({"method": {"name": "lora", "r": 8}}, 78_897_418, 73_354_490),
    (
        {"method": {"name": "lora", "r": 8}, "activation_checkpointing": "full"},
        21_384_386,
        35_594_442,
    ),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 74_074_326, 70_043_334),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


def test_the_gelu_of_old_configurations_costs_what_the_tanh_one_does(peaks: Peaks) -> None:
    """GemmaConfig reads `gelu` as `gelu_pytorch_tanh`; both are one kernel."""
    assert peaks({**CONFIG, "hidden_act": "gelu"}, {}) == peaks(CONFIG, {})


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_attention_in_both_directions_is_refused_by_name(model_type: str) -> None:
    config = {**CONFIG, "model_type": model_type, "use_bidirectional_attention": True}
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        read_spec(config, "model")
