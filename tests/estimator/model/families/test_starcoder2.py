"""StarCoder2: bytes that the dry run of the real class shows, and where its biases are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.model.families import read_spec

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels, the states of dropout's generator and
# the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "starcoder2",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
# Every dropout, and a length that reaches the window.
DROPOUT = {
    **CONFIG,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "sliding_window": 512,
}

# Traced by `profiler.engine.trace`: Starcoder2ForCausalLM of transformers 5.23.0 under torch
# 2.13.0, two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of loss
# forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 42_844_076, 35_671_964),
    ({"precision": "fp32"}, 101_514_468, 102_842_324),
    ({"precision": "amp_bf16"}, 66_319_788, 58_088_732),
    ({"attention": "eager"}, 82_116_452, 80_814_292),
    ({"precision": "amp_bf16", "attention": "eager"}, 105_592_164, 102_711_252),
    ({"attention": "flash_attention_2"}, 42_844_052, 35_671_940),
    ({"padding": True}, 47_562_596, 40_390_484),
    ({"activation_checkpointing": "full"}, 24_661_860, 23_441_516),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 43_418_980, 42_199_788),
    ({"method": {"name": "lora", "r": 8}}, 53_134_960, 45_784_672),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 42_844_076, 37_719_964),
]
TRACED_DROPOUT: list[tuple[dict[str, Any], int, int]] = [
    ({}, 49_397_604, 42_225_492),
    ({"precision": "fp32"}, 84_524_260, 82_484_436),
    ({"precision": "amp_bf16"}, 72_873_316, 64_642_260),
    ({"attention": "eager"}, 90_242_916, 86_319_316),
    ({"precision": "amp_bf16", "attention": "eager"}, 113_718_628, 110_313_428),
    ({"attention": "flash_attention_2"}, 44_679_060, 37_506_948),
    ({"padding": True}, 49_397_604, 42_225_492),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 44_205_412, 45_381_716),
    ({"method": {"name": "lora", "r": 8}}, 59_426_344, 51_813_912),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 50_970_492, 45_846_380),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_DROPOUT)
def test_the_peaks_with_dropout_and_a_window_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(DROPOUT, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_tensors_of_a_layer_are_those_of_transformers(use_bias: bool) -> None:
    import torch
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = {**CONFIG, "use_bias": use_bias, "bos_token_id": 0, "eos_token_id": 0}
    with torch.device("meta"):
        model = Starcoder2ForCausalLM(Starcoder2Config(**config))
    theirs = {name: tuple(each.shape) for name, each in model.model.layers[0].named_parameters()}
    (kind,) = read_spec(config, "model").kinds
    ours = {
        f"{module.name}.{weight.name}": tuple(each.value for each in weight.shape)
        for module in kind.modules
        for weight in module.weights()
    }
    assert ours == theirs
