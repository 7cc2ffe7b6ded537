"""Partial training: what is trained, against transformers' own parameters and printed counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from tests.conformance.cases import MODELS

GPT2_MEDIUM = {
    "model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024,
    "vocab_size": 50257,
}  # fmt: skip


def _trainable(config: dict[str, Any], **knobs: Any) -> int:
    method = {"name": "partial", **knobs}
    request = parse_request({"model": {"config": config}, "method": method})
    return resolve(request, config, "model").spec.trainable_parameters()


def _counted(config: dict[str, Any], chosen: Callable[[str], bool]) -> int:
    """Count the parameters that transformers builds and that a test chooses by name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    return sum(each.numel() for name, each in model.named_parameters() if chosen(name))


def test_the_last_two_layers_of_gpt2_medium_train_what_the_lora_paper_prints():
    # hu2021, table 3, row "GPT-2 M (FT^Top2)": 25.19M trainable parameters.
    assert round(_trainable(GPT2_MEDIUM, last_layers=2) / 1e6, 2) == 25.19


CASES: list[tuple[str, dict[str, Any], Callable[[str], bool]]] = [
    ("gpt2", {"biases": True}, lambda name: name.endswith("bias")),
    ("opt", {"biases": True}, lambda name: name.endswith("bias")),
    ("qwen2", {"biases": True}, lambda name: name.endswith("bias")),
    ("llama", {"norms": True}, lambda name: "norm" in name),
    ("gemma2", {"norms": True}, lambda name: "norm" in name),
    ("bloom", {"norms": True}, lambda name: "layernorm" in name or "ln_f" in name),
    ("llama", {"modules": ["lm_head"]}, lambda name: "lm_head" in name),
    ("qwen2", {"modules": ["lm_head"]}, lambda name: "embed_tokens" in name),
    ("gpt2", {"embeddings": True}, lambda name: "wte" in name or "wpe" in name),
    ("starcoder2", {"embeddings": True}, lambda name: "embed_tokens" in name),
    ("phi3", {"modules": ["mlp"]}, lambda name: ".mlp." in name),
    ("gemma3", {"last_layers": 2}, lambda name: ".layers.6." in name or ".layers.7." in name),
    (
        "llama",
        {"last_layers": 1, "modules": ["q_proj", "lm_head"]},
        lambda name: ".4.self_attn.q_proj" in name or "lm_head" in name,
    ),
    (
        "falcon-new",
        {"last_layers": 3, "norms": True, "embeddings": True},
        lambda name: ("ln_" in name and ".0." not in name) or "word_embeddings" in name,
    ),
]


@pytest.mark.parametrize(("family", "knobs", "chosen"), CASES)
def test_what_is_named_is_trained_and_nothing_else(family, knobs, chosen):
    assert _trainable(MODELS[family], **knobs) == _counted(MODELS[family], chosen)


def test_bitfit_is_a_word_for_biases():
    request = parse_request({"model": "gpt2", "method": "bitfit"})
    assert (
        request.method
        == parse_request({"model": "gpt2", "method": {"name": "partial", "biases": True}}).method
    )


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({}, "give last_layers"),
        ({"modules": ["no_proj"]}, "has no 'no_proj'"),
        ({"biases": True}, "has none"),
        ({"last_layers": 33}, "has 32 layers"),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(knobs, said):
    document = {
        "model": "meta-llama/Llama-3.1-8B", "method": {"name": "partial", **knobs},
    }  # fmt: skip
    with pytest.raises(InvalidRequestError, match=said):
        estimate(document)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("method", "badam_ratio"),
        ("quantization", "int4"),
        ("quantization", "fp8"),
    ],
)
def test_what_has_no_source_is_refused_by_name_with_what_is_near(field, name):
    with pytest.raises(UnsupportedCombinationError, match=f"'{name}' has no sourced answer"):
        parse_request({"model": "gpt2", field: name})


def test_kernels_that_are_no_list_are_an_invalid_field():
    with pytest.raises(InvalidRequestError, match="kernels"):
        parse_request({"model": "gpt2", "kernels": 5})


def test_frozen_layers_below_the_trained_ones_save_nothing():
    """Two models that differ by frozen layers alone keep the same activations (dry run agrees)."""

    def activations(layers: int) -> int:
        config = {**MODELS["llama"], "num_hidden_layers": layers}
        result = estimate(
            {"model": {"config": config}, "method": {"name": "partial", "last_layers": 2}}
        )
        return next(each.bytes for each in result.breakdown if each.component == "activations")

    assert activations(4) == activations(12)
