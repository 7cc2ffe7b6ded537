"""GPT-2: bytes that the dry run of the real class shows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidConfigError, InvalidRequestError, UnsupportedModelError
from estimator.model.families import read_spec
from estimator.request import parse_request
from estimator.service import estimate

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels, the states of dropout's generator
# and the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 1024,
    "vocab_size": 1000,
}

# Traced by `profiler.engine.trace`: GPT2LMHeadModel, transformers 5.23.0, torch 2.13.0, three
# layers, two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of
# loss forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 74_643_200, 68_824_304),
    ({"precision": "fp32"}, 135_011_512, 135_948_456),
    ({"precision": "amp_bf16"}, 120_808_192, 122_317_040),
    ({"attention": "eager"}, 106_051_256, 100_232_360),
    ({"attention": "eager", "micro_batch_size": 1}, 61_687_472, 59_301_032),
    ({"precision": "amp_bf16", "attention": "eager"}, 164_799_160, 166_308_008),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 56_222_392, 78_237_888),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 76_448_448, 70_156_976),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 77_788_928, 74_018_032),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


def test_a_length_beyond_the_table_of_positions_is_refused() -> None:
    request = parse_request({"model": {"config": CONFIG}, "seq_len": 1025})
    with pytest.raises(InvalidRequestError, match="1024 positions"):
        estimate(request)


@pytest.mark.parametrize("flag", ["add_cross_attention", "reorder_and_upcast_attn"])
def test_a_forward_that_is_not_modelled_is_refused_by_name(flag: str) -> None:
    with pytest.raises(UnsupportedModelError, match=flag):
        read_spec({**CONFIG, flag: True}, "model")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="n_head"):
        read_spec({**CONFIG, "n_head": 7}, "model")


def test_the_projections_are_stored_input_first() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**{**CONFIG, "bos_token_id": 0, "eos_token_id": 0}))
    theirs = {
        name.removeprefix("transformer.h.0."): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if name.startswith("transformer.h.0.")
    }
    (kind,) = read_spec(CONFIG, "model").kinds
    ours = {
        f"{module.name}.{weight.name}": tuple(each.value for each in weight.shape)
        for module in kind.modules
        for weight in module.weights()
    }
    assert ours == theirs
