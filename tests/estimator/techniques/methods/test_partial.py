"""Partial training: what is trained, against transformers' own parameters and printed counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.memory.standing import standing
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


@pytest.mark.parametrize("freeze_others", [True, False])
@pytest.mark.parametrize(("family", "knobs", "chosen"), CASES)
def test_what_is_named_is_trained_and_nothing_else(family, knobs, chosen, freeze_others):
    knobs = {**knobs, "freeze_others": freeze_others}
    assert _trainable(MODELS[family], **knobs) == _counted(MODELS[family], chosen)


@pytest.mark.parametrize(("family", "knobs", "chosen"), CASES)
def test_what_is_not_frozen_keeps_the_gradients_that_a_real_step_leaves(family, knobs, chosen):
    """torch itself says which gradients are left when its optimizer has cleared its own."""
    method = {"name": "partial", **knobs, "freeze_others": False}
    document = {"model": {"config": MODELS[family]}, "method": method, "precision": "fp32"}
    run = resolve(parse_request(document), MODELS[family], "model")
    kept = [each for each in standing(run).entries if each.row.component == "gradients"]
    assert sum(each.row.size[0] * each.count for each in kept) == _left(MODELS[family], chosen)


def _left(config: dict[str, Any], chosen: Callable[[str], bool]) -> int:
    """Return the bytes of gradients that are there after `zero_grad` of an optimizer of some."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    given = [each for name, each in model.named_parameters() if chosen(name)]
    optimizer = torch.optim.SGD(given, lr=1e-3)
    for each in model.parameters():
        each.grad = torch.empty_like(each)
    optimizer.zero_grad()
    return sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)


def test_only_the_optimizer_tells_weights_apart_that_are_not_frozen():
    """Without states, clipping or an update, the step is full training with standing gradients."""

    def at(moment: str, **document: Any) -> int:
        result = estimate({"model": "gpt2", "seq_len": 512, "precision": "fp32", **document})
        return next(each.bytes for each in result.timeline if each.moment == moment)

    head = {"name": "partial", "norms": True, "freeze_others": False}
    assert at("end of backward", method=head, optimizer="sgd") == at(
        "end of backward", method="full", optimizer="sgd"
    )


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"optimizer": "lomo"}, "optimizer 'lomo'"),
        ({"precision": "megatron_bf16"}, "precision 'megatron_bf16'"),
        ({"software": {"framework": "trl"}, "loss": "chunked"}, "software 'trl'"),
    ],
)
def test_what_would_take_or_clear_every_gradient_is_refused_by_name(beside, said):
    method = {"name": "partial", "last_layers": 1, "freeze_others": False}
    document = {"model": "meta-llama/Llama-3.2-1B", "method": method, **beside}
    with pytest.raises(UnsupportedCombinationError, match=said):
        estimate(document)


def test_the_answer_says_which_parameters_it_calls_trainable():
    method = {"name": "partial", "last_layers": 16, "freeze_others": False}
    result = estimate({"model": "meta-llama/Llama-3.2-1B", "method": method})
    # All 1,235,814,400 but the tied table of 128,256 x 2,048 and the final norm.
    assert result.parameters.trainable == 973_144_064
    assert any("262,670,336 others require gradients too" in each for each in result.notes)


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
        ({"freeze_others": False}, "give last_layers"),
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
