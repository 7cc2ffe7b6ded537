"""Llama, Mistral, Qwen 2 and Qwen 3: what a configuration becomes."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidConfigError
from estimator.model.families import read_spec
from estimator.model.spec import Linear, ModelSpec

TOY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "vocab_size": 128,
}


def _windows(spec: ModelSpec) -> list[int | None]:
    return [spec.kinds[index].sliding_window for index in spec.pattern]


def _biased(spec: ModelSpec) -> set[str]:
    modules = (module for kind in spec.kinds for module in kind.modules)
    return {module.name for module in modules if isinstance(module, Linear) and module.bias}


def _windows_of_transformers(config: dict[str, Any]) -> list[int | None]:
    """Return the window that each layer of the real model has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    return [layer.self_attn.sliding_window for layer in model.model.layers]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4},
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 512,
            "max_window_layers": 2,
        },
        {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": 512},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ],
)
def test_qwen_slides_in_the_layers_in_which_transformers_slides(change: dict[str, Any]) -> None:
    config = {**TOY, "num_key_value_heads": 4, **change}
    assert _windows(read_spec(config, "model")) == _windows_of_transformers(config)


@pytest.mark.parametrize(
    ("change", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 128}, 128)],
)
def test_mistral_slides_in_every_layer_or_in_none(
    change: dict[str, int | None], window: int | None
) -> None:
    spec = read_spec({**TOY, "model_type": "mistral", **change}, "model")
    assert _windows(spec) == [window] * 6


@pytest.mark.parametrize(
    ("change", "biased"),
    [
        ({}, set()),
        ({"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"mlp_bias": True}, {"gate_proj", "up_proj", "down_proj"}),
        ({"model_type": "qwen2"}, {"q_proj", "k_proj", "v_proj"}),
        ({"model_type": "qwen3"}, set()),
    ],
)
def test_biases_are_where_the_class_has_them(change: dict[str, Any], biased: set[str]) -> None:
    spec = read_spec({**TOY, "num_key_value_heads": 4, **change}, "model")
    assert {name.rsplit(".", 1)[-1] for name in _biased(spec)} == biased


def test_a_tied_head_is_counted_once() -> None:
    untied, tied = (
        read_spec({**TOY, "tie_word_embeddings": tie}, "model").total_parameters()
        for tie in (False, True)
    )
    assert untied - tied == 128 * 64


def test_a_list_of_layers_of_another_length_is_refused() -> None:
    types = ["full_attention"] * 5
    with pytest.raises(InvalidConfigError, match="layer_types must be a list of 6 names"):
        read_spec({**TOY, "model_type": "qwen2", "layer_types": types}, "model")
