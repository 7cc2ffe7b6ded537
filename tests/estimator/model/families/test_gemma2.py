"""Gemma 2: bytes that the dry run of the real class shows, and what is resolved or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidConfigError
from estimator.model.families import read_spec
from estimator.service import estimate

Peaks = Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]

# What the engine leaves out, all told: the shifted labels and the numbers of the positions.
LEFT_OUT = 32 * 1024

CONFIG: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
}
UNCAPPED = {**CONFIG, "attn_logit_softcapping": None, "final_logit_softcapping": None}

# Traced by `profiler.engine.trace`: Gemma2ForCausalLM of transformers 5.23.0 under torch 2.13.0,
# two rows of 512 tokens. Requested bytes without the cuBLAS workspaces at the peaks of loss
# forward and of backward.
TRACED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 183_979_218, 177_818_818),
    ({"precision": "fp32"}, 252_781_268, 252_764_868),
    ({"precision": "amp_bf16"}, 223_539_924, 216_330_948),
    ({"attention": "eager"}, 183_979_218, 177_818_818),
    ({"padding": True}, 183_979_218, 177_818_818),
    ({"attention": "flash_attention_2"}, 112_741_650, 106_581_250),
    ({"attention": "flash_attention_2", "precision": "amp_bf16"}, 152_302_356, 145_093_380),
    (
        {"attention": "flash_attention_2", "activation_checkpointing": "full"},
        41_295_058,
        54_014_162,
    ),
    ({"method": {"name": "lora", "r": 8}}, 178_861_306, 172_176_618),
    (
        {"method": {"name": "lora", "r": 8}, "activation_checkpointing": "full"},
        28_449_018,
        59_244_778,
    ),
    ({"loop": {"keep_outputs": True, "use_cache": True}}, 188_173_538, 184_061_138),
]
TRACED_UNCAPPED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 165_154_002, 159_075_010),
    ({"precision": "fp32"}, 215_130_836, 213_091_012),
    ({"precision": "amp_bf16"}, 204_714_708, 197_587_652),
    ({"attention": "flash_attention_2"}, 110_693_650, 104_614_658),
    ({"method": {"name": "lora", "r": 8}}, 160_036_090, 154_493_162),
]


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED)
def test_the_peaks_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(CONFIG, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


@pytest.mark.parametrize(("recipe", "loss_forward", "backward"), TRACED_UNCAPPED)
def test_the_peaks_without_caps_are_those_of_the_real_class(
    peaks: Peaks, recipe: dict[str, Any], loss_forward: int, backward: int
) -> None:
    ours = peaks(UNCAPPED, recipe)
    assert ours == pytest.approx((loss_forward, backward), abs=LEFT_OUT)


def test_sdpa_becomes_eager_as_in_transformers_and_the_answer_says_so() -> None:
    """Gemma2PreTrainedModel has `_supports_sdpa = False`: unasked, it is built with eager."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**CONFIG, "hidden_size": 64, "pad_token_id": 0}
    real = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )
    assert real.config._attn_implementation == "eager"
    sdpa, eager = (
        estimate({"model": {"config": CONFIG}, "seq_len": 128, "attention": name})
        for name in ("sdpa", "eager")
    )
    assert sdpa.breakdown == eager.breakdown
    assert any("no sdpa attention for gemma2" in note for note in sdpa.notes)
    assert not any("no sdpa" in note for note in eager.notes)


def test_layers_take_turns_as_in_transformers() -> None:
    from transformers import Gemma2Config

    theirs = Gemma2Config(**{**CONFIG, "num_hidden_layers": 5}).layer_types
    spec = read_spec({**CONFIG, "num_hidden_layers": 5}, "model")
    windows = [spec.kinds[index].sliding_window for index in spec.pattern]
    assert [window is not None for window in windows] == [
        each == "sliding_attention" for each in theirs
    ]


def test_a_type_of_layer_that_the_family_lacks_is_refused() -> None:
    types = ["sliding_attention", "full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(InvalidConfigError, match="chunked_attention"):
        read_spec({**CONFIG, "layer_types": types}, "model")


def test_a_sliding_layer_without_a_window_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="sliding_window"):
        read_spec({**CONFIG, "sliding_window": None}, "model")


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_heads_that_do_not_divide_the_hidden_size_are_refused_as_in_transformers(
    model_type: str,
) -> None:
    from transformers import AutoConfig

    config = {**CONFIG, "model_type": model_type, "num_attention_heads": 6}
    values = dict(config)
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        AutoConfig.for_model(values.pop("model_type"), **values)
    with pytest.raises(InvalidConfigError, match="no multiple of num_attention_heads 6"):
        read_spec(config, "model")
