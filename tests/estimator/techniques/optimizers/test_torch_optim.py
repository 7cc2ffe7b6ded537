"""States of torch's optimizers, counted on the real ones after a real step."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import EstimatorError, InvalidRequestError
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import TOY, kept_by, kept_in_the_answer

_CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"name": "nadam"}, "NAdam", {}),
    ({"name": "radam"}, "RAdam", {}),
    ({"name": "rmsprop"}, "RMSprop", {}),
    ({"name": "rmsprop", "momentum": 0.9}, "RMSprop", {"momentum": 0.9}),
    ({"name": "rmsprop", "centered": True}, "RMSprop", {"centered": True}),
    ({"name": "adagrad"}, "Adagrad", {}),
    ({"name": "adamw", "amsgrad": True}, "AdamW", {"amsgrad": True}),
    ({"name": "torch_adafactor"}, "Adafactor", {}),
    ({"name": "sgd", "momentum": 0.9, "nesterov": True}, "SGD", {"momentum": 0.9}),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("asked", "name", "settings"), _CASES, ids=lambda value: str(value))
def test_an_optimizer_keeps_what_that_of_torch_keeps(
    asked: dict[str, Any], name: str, settings: dict[str, Any], precision: str
) -> None:
    import torch

    real = kept_by(lambda parameters: getattr(torch.optim, name)(parameters, **settings), precision)
    implementation = {"implementation": "single"}
    assert kept_in_the_answer({**asked, **implementation}, precision) == real


def test_adafactor_with_momentum_keeps_what_that_of_transformers_keeps() -> None:
    from transformers.optimization import Adafactor

    real = kept_by(lambda parameters: Adafactor(parameters, beta1=0.9), "bf16")
    assert kept_in_the_answer({"name": "adafactor", "beta1": 0.9}, "bf16") == real


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"name": "adamw", "momentum": 0.9}, "momentum is a setting of sgd, rmsprop"),
        ({"name": "sgd", "amsgrad": True}, "amsgrad is a setting of adam, adamw"),
        ({"name": "nadam", "implementation": "fused"}, "it has foreach, single"),
    ],
)
def test_a_knob_of_another_optimizer_is_refused_with_those_that_have_it(
    optimizer: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        estimate({"model": {"config": TOY}, "optimizer": optimizer})


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"precision": "master_bf16"},
        {"loop": {"set_to_none": False}},
    ],
)
@pytest.mark.parametrize("optimizer", [{"in_backward": True}, {"name": "lomo"}])
def test_an_optimizer_in_backward_refuses_what_needs_the_gradients_later(
    optimizer: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(EstimatorError, match="in backward"):
        estimate({"model": {"config": TOY}, "optimizer": optimizer, **changes})
