"""GPT-NeoX: bytes that the dry run of the real class shows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidConfigError
from estimator.model.families import read_spec

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels, the states of dropout's generator
# and the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "rotary_pct": 0.25,
}
SEQUENTIAL = {
    **CONFIG,
    "rotary_pct": 1.0,
    "use_parallel_residual": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
# As gpt-neox-20b.
GELU_FAST = {**CONFIG, "hidden_act": "gelu_fast"}

# Traced by `profiler.engine.trace`: GPTNeoXForCausalLM, transformers 5.23.0, torch 2.13.0, three
# layers, two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of
# loss forward and of backward.
# FlashAttention's output lies in memory as the query does, so that behind the rotary positions' cat
# it is copied (flash_attn/flash_api.cpp, mha_fwd: `out = at::empty_like(q_padded)`).
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 57_071_424, 49_899_312),
    ({"precision": "fp32"}, 98_561_272, 96_521_448),
    ({"precision": "amp_bf16"}, 82_785_088, 74_594_608),
    ({"attention": "eager"}, 90_052_344, 88_292_072),
    ({"attention": "eager", "micro_batch_size": 1}, 55_256_816, 54_704_872),
    ({"precision": "amp_bf16", "attention": "eager"}, 115_766_008, 112_948_456),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 55_952_120, 57_782_528),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 57_586_432, 51_557_104),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 53_925_696, 48_801_584),
]
TRACED_SEQUENTIAL: list[tuple[dict[str, Any], int, int]] = [
    ({}, 60_577_792, 53_405_680),
    ({"precision": "fp32"}, 103_738_808, 101_698_984),
    ({"precision": "amp_bf16"}, 87_962_624, 79_728_112),
    ({"attention": "eager"}, 99_850_168, 94_944_168),
    ({"attention": "eager", "micro_batch_size": 1}, 60_204_976, 58_080_168),
    ({"precision": "amp_bf16", "attention": "eager"}, 127_235_000, 122_844_584),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 56_411_064, 59_551_168),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 60_838_848, 54_547_376),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 57_432_064, 52_307_952),
]
TRACED_GELU_FAST: list[tuple[dict[str, Any], int, int]] = [
    ({}, 94_820_160, 89_263_408),
    ({"precision": "fp32"}, 174_058_744, 175_257_832),
    ({"precision": "amp_bf16"}, 120_533_824, 114_440_496),
    ({"attention": "eager"}, 127_801_080, 122_244_328),
    ({"attention": "eager", "micro_batch_size": 1}, 74_131_184, 71_875_816),
    ({"precision": "amp_bf16", "attention": "eager"}, 153_514_744, 147_421_416),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 55_952_120, 72_462_592),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 95_335_168, 89_305_840),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 91_674_432, 88_165_680),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_SEQUENTIAL)
def test_the_peaks_with_blocks_in_sequence_and_dropout_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(SEQUENTIAL, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_GELU_FAST)
def test_the_peaks_with_a_gelu_in_separate_operators_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(GELU_FAST, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rotary_pct": 1.0},
        {"rotary_pct": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ],
)
def test_the_rotary_width_is_that_of_the_real_class(change: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, GPTNeoXForCausalLM

    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    spec = read_spec(config, "model")
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(AutoConfig.for_model("gpt_neox", **values))
    assert spec.rotary_width == model.gpt_neox.layers[0].attention.rotary_ndims
    ours = {each.name: each.shape[0].value for each in spec.buffers}
    theirs = {name: len(buffer) for name, buffer in model.gpt_neox.named_buffers()}
    assert ours == theirs


def test_a_rotary_share_above_one_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="rotary_pct"):
        read_spec({**CONFIG, "rotary_pct": 1.5}, "model")
