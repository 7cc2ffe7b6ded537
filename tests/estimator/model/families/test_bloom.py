"""BLOOM: what a configuration becomes, what it refuses, and what a layer keeps for backward."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import (
    InvalidConfigError,
    UnsupportedCombinationError,
    UnsupportedModelError,
)
from estimator.model.families import read_spec
from estimator.service import estimate

TOY: dict[str, Any] = {
    "model_type": "bloom",
    "hidden_size": 64,
    "n_head": 4,
    "n_layer": 4,
    "vocab_size": 320,
}


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
