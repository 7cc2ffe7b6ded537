"""Falcon: its three arrangements of heads and norms, what it refuses, and its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidConfigError, UnsupportedCombinationError
from estimator.model.families import read_spec
from estimator.service import estimate

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

ONE_KEY_HEAD: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 320,
}
GROUPED: dict[str, Any] = {
    **ONE_KEY_HEAD,
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
}
ALIBI: dict[str, Any] = {
    **ONE_KEY_HEAD,
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
}
ARRANGEMENTS = [
    ONE_KEY_HEAD,
    GROUPED,
    {**GROUPED, "num_ln_in_parallel_attn": 1},
    {**GROUPED, "num_kv_heads": None},
    ALIBI,
    {**ONE_KEY_HEAD, "multi_query": False},
    {**ONE_KEY_HEAD, "parallel_attn": False, "ffn_hidden_size": 96},
]

# What the engine leaves out, all told: the shifted labels and the numbers of the positions.
LEFT_OUT = 32 * 1024

# Traced by `profiler.engine.trace`: FalconForCausalLM, transformers 5.23.0, torch 2.13.0, three
# layers, two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of
# loss forward and of backward.
SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 1000}
LORA = {"name": "lora", "r": 8, "target_modules": "all-linear"}
TRACED: dict[str, tuple[dict[str, Any], list[tuple[dict[str, Any], int, int]]]] = {
    "one key head": (
        {**ONE_KEY_HEAD, **SIZES},
        [
            ({}, 77_332_892, 80_033_164),
            ({"precision": "fp32"}, 107_700_636, 109_422_988),
            ({"precision": "amp_bf16"}, 100_757_916, 102_410_636),
            ({"micro_batch_size": 1}, 43_336_084, 45_929_868),
            ({"attention": "eager"}, 60_031_388, 54_736_268),
            ({"method": LORA}, 81_555_880, 78_893_464),
            ({"loop": {"keep_outputs": True, "use_cache": True}}, 78_119_324, 82_867_596),
        ],
    ),
    "grouped": (
        {**GROUPED, **SIZES, "num_attention_heads": 8},
        [
            ({}, 52_233_524, 45_061_412),
            ({"precision": "fp32"}, 91_982_132, 89_942_308),
            ({"precision": "amp_bf16"}, 74_029_364, 65_851_684),
            ({"micro_batch_size": 1}, 33_117_484, 29_813_028),
            ({"attention": "eager"}, 74_155_316, 77_117_732),
            ({"activation_checkpointing": "full"}, 27_448_580, 29_939_972),
            (
                {"precision": "amp_bf16", "activation_checkpointing": "full"},
                45_115_652,
                50_168_068,
            ),
            ({"method": LORA}, 56_442_152, 50_412_824),
            ({"loop": {"keep_outputs": True, "use_cache": True}}, 52_233_524, 47_109_412),
        ],
    ),
    "ALiBi": (
        {**ALIBI, **SIZES},
        [
            ({}, 56_551_348, 49_379_236),
            ({"precision": "fp32"}, 100_666_804, 98_626_980),
            ({"precision": "amp_bf16"}, 96_935_348, 92_428_708),
            ({"micro_batch_size": 1}, 36_149_164, 32_845_220),
            ({"attention": "eager"}, 64_890_804, 62_606_244),
            ({"activation_checkpointing": "full"}, 33_003_444, 35_357_092),
            (
                {"precision": "amp_bf16", "activation_checkpointing": "full"},
                56_749_492,
                73_798_052,
            ),
            ({"method": LORA}, 59_671_416, 53_642_088),
            ({"loop": {"keep_outputs": True, "use_cache": True}}, 59_697_076, 54_572_964),
        ],
    ),
}


@pytest.mark.parametrize(
    ("config", "recipe", "loss_forward", "backward"),
    [(config, *row) for config, rows in TRACED.values() for row in rows],
)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks,
    config: dict[str, Any],
    recipe: dict[str, Any],
    loss_forward: int,
    backward: int,
) -> None:
    assert peaks(config, recipe) == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize("config", ARRANGEMENTS)
def test_every_arrangement_has_the_tensors_that_transformers_builds(
    config: dict[str, Any],
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    spec = read_spec(config, "model")
    ours = {
        f"{module.name}.{weight.name}": tuple(each.value for each in weight.shape)
        for module in spec.kinds[0].modules
        for weight in module.weights()
    }
    theirs = {name: tuple(each.shape) for name, each in real.transformer.h[1].named_parameters()}
    assert ours == theirs
    assert spec.total_parameters() == sum(each.numel() for each in real.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_attn": False, "new_decoder_architecture": True}, "parallel_attn=False"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads 5"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "no multiple of num_kv_heads 3"),
    ],
)
def test_what_the_forward_pass_of_transformers_fails_on_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        read_spec({**ONE_KEY_HEAD, **change}, "model")


def test_flash_attention_with_alibi_is_refused_as_transformers_refuses_it() -> None:
    with pytest.raises(UnsupportedCombinationError, match=r"flash_attention_2 .* falcon .* sdpa"):
        estimate({"model": {"config": ALIBI}, "attention": "flash_attention_2"})


def test_flash_attention_keeps_no_scores_where_sdpa_has_to() -> None:
    """With one key head sdpa has no fused kernel, because the model does not ask for groups."""
    sdpa, flash = (
        estimate(
            {"model": {"config": ONE_KEY_HEAD}, "seq_len": 1024, "attention": name}
        ).peak.allocated_bytes.expected
        for name in ("sdpa", "flash_attention_2")
    )
    scores = 4 * 4 * 1024 * 1024 * 4
    assert sdpa - flash > scores
