"""Gemma 3: bytes that the dry run of the real class shows, its pattern of layers, its refusal."""

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
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
}
SHORT_WINDOW = {**CONFIG, "sliding_window": 512}

# Traced by `profiler.engine.trace`: Gemma3ForCausalLM of transformers 5.23.0 under torch 2.13.0,
# two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of loss
# forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 227_175_990, 221_096_998),
    ({"precision": "fp32"}, 410_006_928, 407_967_104),
    ({"precision": "amp_bf16"}, 294_159_928, 287_032_872),
    ({"attention": "eager"}, 322_481_550, 316_402_558),
    ({"precision": "amp_bf16", "attention": "eager"}, 389_465_488, 382_338_432),
    ({"attention": "flash_attention_2"}, 227_175_934, 221_096_942),
    ({"padding": True}, 241_855_886, 235_776_894),
    ({"method": {"name": "lora", "r": 8}}, 205_877_834, 200_334_906),
    (
        {"method": {"name": "lora", "r": 8}, "activation_checkpointing": "full"},
        33_319_330,
        52_573_610,
    ),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 227_176_038, 223_145_046),
]
# The length reaches the window: sliding layers have a mask and leave FlashAttention.
TRACED_SHORT_WINDOW: list[tuple[dict[str, Any], int, int]] = [
    ({}, 239_758_758, 233_679_766),
    ({"precision": "fp32"}, 372_356_496, 370_316_672),
    ({"precision": "amp_bf16"}, 306_742_696, 299_615_640),
    ({"attention": "eager"}, 322_481_550, 316_402_558),
    ({"attention": "flash_attention_2"}, 227_175_934, 221_096_942),
    ({"padding": True}, 241_855_886, 235_776_894),
    ({"method": {"name": "lora", "r": 8}}, 218_460_602, 212_917_674),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 246_050_262, 242_019_270),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_SHORT_WINDOW)
def test_the_peaks_beyond_the_window_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(SHORT_WINDOW, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize("change", [{}, {"sliding_window_pattern": 3}])
def test_layers_take_turns_as_in_transformers(change: dict[str, Any]) -> None:
    from transformers import Gemma3TextConfig

    theirs = Gemma3TextConfig(**{**CONFIG, **change}).layer_types
    spec = read_spec({**CONFIG, **change}, "model")
    windows = [spec.kinds[index].sliding_window for index in spec.pattern]
    assert [window is not None for window in windows] == [
        each == "sliding_attention" for each in theirs
    ]


def test_the_model_with_images_is_refused_as_multimodal() -> None:
    config = {"model_type": "gemma3", "text_config": CONFIG, "vision_config": {}}
    with pytest.raises(UnsupportedModelError, match="multimodal"):
        read_spec(config, "model")
