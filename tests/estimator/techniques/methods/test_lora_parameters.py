"""LoRA on parameters: counts against PEFT, and what PEFT refuses."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from tests.conformance.counts import counted_by_peft, counted_here

DOWN = {"llama": "mlp.down_proj.weight", "gpt2": "mlp.c_proj.weight", "qwen2": "q_proj.weight"}


def _method(**knobs: Any) -> dict[str, Any]:
    return {"name": "lora", "target_modules": [], **knobs}


@pytest.mark.parametrize("model", DOWN)
@pytest.mark.parametrize("r", [3, 16])
def test_the_parameters_are_those_that_peft_counts(model: str, r: int):
    method = _method(target_parameters=[DOWN[model]], r=r)
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_one_layer_with_a_rank_of_its_own_beside_modules_is_counted_as_peft_counts():
    method = _method(
        target_modules=["v_proj"], target_parameters=["layers.2.mlp.up_proj.weight"],
        rank_pattern={"mlp.up_proj.weight": 5},
    )  # fmt: skip
    assert counted_here(method, "llama") == counted_by_peft(method, "llama")


@pytest.mark.parametrize(
    "knobs",
    [
        {"target_parameters": ["input_layernorm.weight"]},
        {"target_parameters": ["q_proj.weight"], "lora_dropout": 0.1},
        {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_what_peft_refuses_is_refused(knobs: dict[str, Any]):
    with pytest.raises(InvalidRequestError):
        counted_here(_method(**knobs), "llama")
    with pytest.raises(InvalidRequestError, match="PEFT refuses"):
        counted_by_peft(_method(**knobs), "llama")


def test_parameters_beside_a_conv1d_are_refused_as_peft_refuses_them():
    method = _method(target_modules=["c_attn"], target_parameters=["mlp.c_fc.weight"])
    with pytest.raises(InvalidRequestError, match="Conv1D"):
        counted_here(method, "gpt2")
    with pytest.raises(InvalidRequestError, match="PEFT refuses"):
        counted_by_peft(method, "gpt2")


def test_a_name_that_matches_nothing_is_refused():
    with pytest.raises(InvalidRequestError, match="match no parameter"):
        counted_here(_method(target_parameters=["experts.gate_up_proj"]), "llama")


def test_packed_weights_and_tables_are_refused_by_name():
    method = _method(target_parameters=["embed_tokens.weight"])
    with pytest.raises(UnsupportedCombinationError, match="embed_tokens"):
        counted_here(method, "llama")
    packed = _method(target_parameters=["q_proj.weight"])
    with pytest.raises(UnsupportedCombinationError, match="nf4"):
        counted_here(packed, "llama", quantization="nf4")
