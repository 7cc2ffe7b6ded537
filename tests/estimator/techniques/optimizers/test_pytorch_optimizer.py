"""States of LAMB, SOAP, Shampoo and Adam-mini, counted on the real ones after real steps."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import (
    TOY,
    kept_by,
    kept_in_the_answer,
    toy_model,
)


def test_lamb_keeps_what_that_of_pytorch_optimizer_keeps() -> None:
    from pytorch_optimizer import Lamb

    # In bf16 some gradients of the toy are zero, and their trust ratio is no tensor.
    real = kept_by(lambda parameters: Lamb(parameters, foreach=False), "fp32")
    assert kept_in_the_answer({"name": "lamb", "implementation": "single"}, "fp32") == real


@pytest.mark.parametrize("limit", [10_000, 100, 64])
def test_soap_keeps_what_that_of_pytorch_optimizer_keeps(limit: int) -> None:
    from pytorch_optimizer import SOAP

    optimizers = []

    def build(parameters: list[Any]) -> Any:
        optimizers.append(SOAP(parameters, max_precondition_dim=limit))
        return optimizers[0]

    real = kept_by(build, "fp32") + sum(
        matrix.nbytes
        for state in optimizers[0].state.values()
        for matrix in (*state["GG"], *state["Q"])
        if len(matrix)
    )
    assert kept_in_the_answer({"name": "soap", "max_precondition_dim": limit}, "fp32") == real


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shampoo_keeps_what_that_of_pytorch_optimizer_keeps(precision: str) -> None:
    from pytorch_optimizer import Shampoo

    assert kept_in_the_answer({"name": "shampoo"}, precision) == kept_by(Shampoo, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adam_mini_keeps_what_that_of_its_authors_keeps(precision: str) -> None:
    from adam_mini import Adam_mini

    # The parameters of two models of one configuration have the same names in the same order.
    names = [name for name, _ in toy_model(precision).named_parameters()]
    sizes = {"dim": TOY["hidden_size"], "n_heads": TOY["num_attention_heads"]}

    def build(parameters: list[Any]) -> Any:
        return Adam_mini(list(zip(names, parameters, strict=True)), verbose=False, **sizes)

    assert kept_in_the_answer({"name": "adam_mini"}, precision) == kept_by(build, precision)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {**TOY, "model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 18},
            "self_attn.q_proj.weight is not made of",
        ),
        ({**TOY, "model_type": "gpt_neox"}, "for a matrix by its name"),
    ],
)
def test_adam_mini_refuses_the_names_on_which_the_real_one_raises(
    config: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedCombinationError, match=said):
        estimate({"model": {"config": config}, "optimizer": "adam_mini"})


def test_a_limit_of_preconditioners_is_a_setting_of_soap() -> None:
    asked = {"name": "shampoo", "max_precondition_dim": 100}
    with pytest.raises(InvalidRequestError, match="max_precondition_dim is a setting of soap"):
        estimate({"model": {"config": TOY}, "optimizer": asked})


@pytest.mark.parametrize("name", ["SophiaH", "ScalableShampoo"])
def test_what_is_not_described_is_refused_with_what_is_near(name: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match=r"use 'soap'|use 'sophia'"):
        estimate({"model": {"config": TOY}, "optimizer": name})
