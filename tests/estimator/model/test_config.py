"""Reading a model's configuration: what is taken, what is filled in, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidConfigError, UnsupportedModelError
from estimator.model.config import Config
from estimator.model.families import read_spec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}


@pytest.mark.parametrize("name", sorted(set(LLAMA) - {"model_type"}))
def test_a_missing_shape_is_refused_by_name(name: str) -> None:
    config = {key: value for key, value in LLAMA.items() if key != name}
    with pytest.raises(InvalidConfigError, match=name):
        read_spec(config, "model")


@pytest.mark.parametrize(
    "value", [0, -1, 2**24 + 1, 10**40, True, 1.5, float("nan"), "4096", [4096], {"of": 4096}]
)
def test_a_size_that_no_model_has_is_refused(value: object) -> None:
    with pytest.raises(InvalidConfigError, match=r"hidden_size .* whole number"):
        read_spec({**LLAMA, "hidden_size": value}, "model")


def test_a_billion_layers_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="num_hidden_layers"):
        read_spec({**LLAMA, "num_hidden_layers": 10**9}, "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tie_word_embeddings", "no"),
        ("attention_bias", 1),
        ("hidden_act", 3),
        ("attention_dropout", 1.0),
        ("attention_dropout", -0.1),
        ("attention_dropout", float("nan")),
        ("layer_types", ["full_attention"]),
        ("layer_types", "full_attention"),
        ("layer_types", [1, 2]),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidConfigError, match=name):
        read_spec({**LLAMA, name: value}, "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 64 is no multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        read_spec({**LLAMA, **change}, "model")


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        read_spec({**LLAMA, "hidden_size": "9" * 10_000}, "model")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("model_type", [None, "", 7])
def test_a_configuration_without_a_model_type_is_refused(model_type: object) -> None:
    with pytest.raises(InvalidConfigError, match="model_type"):
        read_spec({**LLAMA, "model_type": model_type}, "model")


def test_an_unknown_family_is_refused_by_name_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'parrot' is not supported yet.*llama"):
        read_spec({**LLAMA, "model_type": "parrot"}, "model")


def test_an_activation_without_a_source_is_refused_by_name() -> None:
    from estimator.service import estimate

    with pytest.raises(UnsupportedModelError, match="'sine' has no source"):
        estimate({"model": {"config": {**LLAMA, "hidden_act": "sine"}}, "seq_len": 16})


def test_a_default_that_is_used_is_told() -> None:
    mistral = {**LLAMA, "model_type": "mistral", "num_attention_heads": 8}
    notes = read_spec(mistral, "model").notes
    assert (
        "num_key_value_heads is not in the model configuration; transformers' default 8 is used"
        in notes
    )


def test_a_given_field_wins_over_the_default() -> None:
    config = Config({**LLAMA, "model_type": "mistral", "sliding_window": 1024})
    assert config.count("sliding_window") == 1024
    assert config.notes == ()


def test_a_field_that_is_null_means_none_and_not_the_default() -> None:
    config = Config({**LLAMA, "model_type": "mistral", "sliding_window": None})
    assert config.optional_count("sliding_window") is None
