"""BLOOM: what a configuration becomes, what it refuses, and what a layer keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import (
    InvalidConfigError,
    UnsupportedCombinationError,
    UnsupportedModelError,
)
from estimator.model.families import read_spec
from estimator.service import estimate

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

TOY: dict[str, Any] = {
    "model_type": "bloom",
    "hidden_size": 64,
    "n_head": 4,
    "n_layer": 4,
    "vocab_size": 320,
}

# What the engine leaves out, all told: the shifted labels and the numbers of the positions.
LEFT_OUT = 32 * 1024

# Traced by `profiler.engine.trace`: BloomForCausalLM, transformers 5.23.0, torch 2.13.0, three
# layers, two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of
# loss forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 90_591_932, 91_326_636),
    ({"precision": "fp32"}, 118_457_532, 132_239_532),
    ({"precision": "amp_bf16"}, 116_837_052, 116_510_892),
    ({"micro_batch_size": 1}, 53_170_868, 54_061_228),
    ({"activation_checkpointing": "full"}, 30_257_852, 53_566_636),
    ({"precision": "amp_bf16", "activation_checkpointing": "full"}, 55_986_876, 77_723_820),
    ({"method": {"name": "lora", "r": 8, "target_modules": "all-linear"}}, 91_604_600, 89_212_520),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 90_591_932, 93_374_636),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    config = {**TOY, "hidden_size": 256, "n_layer": 3, "vocab_size": 1000}
    assert peaks(config, recipe) == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


def test_sdpa_becomes_eager_as_in_transformers_and_the_answer_says_so() -> None:
    """The class has no sdpa: unasked, transformers builds it with eager attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(TOY)
    real = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )
    assert real.config._attn_implementation == "eager"
    sdpa, eager = (
        estimate({"model": {"config": TOY}, "seq_len": 128, "attention": name})
        for name in ("sdpa", "eager")
    )
    assert sdpa.breakdown == eager.breakdown
    assert any("no sdpa attention for bloom" in note for note in sdpa.notes)
    assert not any("sdpa" in note for note in eager.notes if "defaults" not in note)


def test_flash_attention_is_refused_as_transformers_refuses_it() -> None:
    from transformers import BloomForCausalLM

    assert not BloomForCausalLM._supports_flash_attn
    with pytest.raises(UnsupportedCombinationError, match=r"flash_attention_2 .* bloom .* eager"):
        estimate({"model": {"config": TOY}, "attention": "flash_attention_2"})


def test_the_names_of_other_configurations_are_understood() -> None:
    """`attribute_map` of BloomConfig, and the old `n_embed`."""
    renamed = {
        "model_type": "bloom",
        "n_embed": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 320,
    }
    ours = read_spec(renamed, "model").total_parameters()
    assert ours == read_spec(TOY, "model").total_parameters()


def test_multiplying_in_slices_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="slow_but_exact"):
        read_spec({**TOY, "slow_but_exact": True, "pretraining_tp": 4}, "model")
    read_spec({**TOY, "pretraining_tp": 4}, "model")


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="no multiple of n_head 5"):
        read_spec({**TOY, "n_head": 5}, "model")
