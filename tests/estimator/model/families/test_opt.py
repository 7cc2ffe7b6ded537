"""OPT: bytes that the dry run of the real class shows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedModelError
from estimator.model.families import read_spec
from estimator.request import parse_request
from estimator.service import estimate

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels, the states of dropout's generator
# and the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 256,
    "ffn_dim": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}
# As opt-350m: norms behind the blocks, and token embeddings narrower than the layers.
POST_NORM = {**CONFIG, "do_layer_norm_before": False, "word_embed_proj_dim": 128}

# Traced by `profiler.engine.trace`: OPTForCausalLM, transformers 5.23.0, torch 2.13.0, three
# layers, two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of
# loss forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 50_795_312, 44_976_416),
    ({"precision": "fp32"}, 87_573_736, 88_510_680),
    ({"precision": "amp_bf16"}, 82_807_600, 75_927_840),
    ({"attention": "eager"}, 88_494_824, 87_783_128),
    ({"attention": "eager", "micro_batch_size": 1}, 53_695_200, 54_191_832),
    ({"precision": "amp_bf16", "attention": "eager"}, 120_507_112, 118_213_848),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 59_124_456, 61_217_008),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 64_734_960, 58_443_488),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 50_795_312, 47_024_416),
]
TRACED_POST_NORM: list[tuple[dict[str, Any], int, int]] = [
    ({}, 50_409_264, 44_137_760),
    ({"precision": "fp32"}, 86_809_832, 86_841_560),
    ({"precision": "amp_bf16"}, 80_345_904, 74_062_112),
    ({"attention": "eager"}, 88_108_776, 86_944_472),
    ({"attention": "eager", "micro_batch_size": 1}, 53_313_248, 53_488_344),
    ({"precision": "amp_bf16", "attention": "eager"}, 118_045_416, 116_348_120),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 56_662_760, 60_399_856),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 66_059_008, 58_960_624),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 50_409_264, 46_185_760),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_POST_NORM)
def test_the_peaks_with_norms_behind_the_blocks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(POST_NORM, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


def test_a_length_beyond_the_table_of_positions_is_refused() -> None:
    request = parse_request({"model": {"config": CONFIG}, "seq_len": 2049})
    with pytest.raises(InvalidRequestError, match="2048 positions"):
        estimate(request)


def test_layers_dropped_at_random_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layerdrop"):
        read_spec({**CONFIG, "layerdrop": 0.1}, "model")


@pytest.mark.parametrize(
    "change",
    [
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
        {"_remove_final_layer_norm": True},
        {"tie_word_embeddings": False},
    ],
)
def test_the_parameters_of_rare_configurations_are_those_of_transformers(
    change: dict[str, Any],
) -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = {**CONFIG, **change}
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**config))
    theirs = sum(each.numel() for each in model.parameters())
    assert read_spec(config, "model").total_parameters() == theirs
