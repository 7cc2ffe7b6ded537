"""States of bitsandbytes' optimizers, and every name that the Trainer knows."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import optimizer_choice
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import TOY, kept_in_the_answer

LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"
GATE_PARAMETERS = 32 * 4096 * 11_008


def _bytes_of_gate(optimizer: str) -> dict[str, int]:
    result = estimate({"model": LLAMA_2_7B, "optimizer": {"name": optimizer}})
    rows = [row for part in result.breakdown for row in part.rows]
    weight = "mlp.gate_proj.weight."
    return {
        row.name.removeprefix(weight): row.bytes
        for row in rows
        if row.name.startswith(weight) and not row.name.endswith(".grad")
    }


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [
        # dettmers2022, section 2.1: one byte for each value and 4 for each block of 256 (the
        # library's block since 0.44); 32-bit states: 4 bytes whatever the weights are.
        ("lion_8bit", 1 + 4 / 256),
        ("lion_32bit", 4),
        ("adamw_8bit", 2 * (1 + 4 / 256)),
        ("adamw_32bit", 8),
        ("ademamix_8bit", 3 * (1 + 4 / 256)),
        ("ademamix", 12),
        ("paged_adamw_32bit", 0),
        ("paged_ademamix_8bit", 3 * 4 / 256),
    ],
)
def test_a_linear_layer_keeps_this_many_bytes_for_each_parameter(
    optimizer: str, bytes_per_parameter: float
) -> None:
    assert sum(_bytes_of_gate(optimizer).values()) == bytes_per_parameter * GATE_PARAMETERS


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_32bit", "AdamW"), ("lion_32bit", "Lion"), ("lamb_32bit", "LAMB"),
     ("ademamix", "AdEMAMix")],
)  # fmt: skip
def test_32_bit_states_are_those_that_bitsandbytes_makes(name: str, kind: str) -> None:
    import torch
    from bitsandbytes import optim

    from tests.estimator.techniques.optimizers.real import toy_model

    model = toy_model("bf16")
    optimizer = getattr(optim, kind)(list(model.parameters()), optim_bits=32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    real = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert kept_in_the_answer({"name": name}, "bf16") == real


def test_every_optimizer_that_the_trainer_knows_is_answered_or_refused_by_name() -> None:
    from transformers.training_args import OptimizerNames

    refused = {}
    for name in OptimizerNames:
        request = parse_request({"model": {"config": TOY}, "optimizer": name.value})
        try:
            optimizer_choice(request)
        except UnsupportedCombinationError as error:
            refused[name.value] = str(error)
    assert all(repr(name) in said for name, said in refused.items())
    assert "adamw_torch_xla" in refused
    assert "paged_lion_8bit" not in refused


def test_sgd_of_bitsandbytes_is_refused_without_momentum_as_bitsandbytes_does() -> None:
    request: dict[str, Any] = {"model": {"config": TOY}, "optimizer": "sgd_8bit"}
    with pytest.raises(InvalidRequestError, match="momentum"):
        estimate(request)


@pytest.mark.parametrize(
    "optimizer", ["rmsprop_bnb_8bit", "adagrad_32bit", {"name": "lars_32bit", "momentum": 0.9}]
)
def test_what_has_no_kernel_for_bf16_is_refused_with_the_first_such_tensor(optimizer: Any) -> None:
    request: dict[str, Any] = {"model": {"config": TOY}, "optimizer": optimizer}
    with pytest.raises(UnsupportedCombinationError, match=r"embed_tokens.weight is bf16"):
        estimate(request)


def test_the_kernels_without_bf16_are_those_that_bitsandbytes_lists_without() -> None:
    import bitsandbytes

    # Its module runs on CUDA only; the table is read from its source.
    source = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    tables = {
        node.targets[0].id: node.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    table = tables["str2optimizer32bit"]
    assert isinstance(table, ast.Dict)
    # One kernel each for fp32, fp16 and, where there is one, bf16.
    without = {
        name.value
        for name, kernels in zip(table.keys, table.values, strict=True)
        if isinstance(name, ast.Constant) and len(kernels.elts) < 3  # type: ignore[attr-defined]
    }
    assert without == {"momentum", "rmsprop", "adagrad", "lars"}


@pytest.mark.parametrize("optimizer", ["LAMB8bit", "lars_8bit"])
def test_8_bit_lamb_and_lars_are_refused_since_they_have_no_kernel(optimizer: str) -> None:
    request: dict[str, Any] = {"model": {"config": TOY}, "optimizer": optimizer}
    with pytest.raises(UnsupportedCombinationError, match="no 8-bit kernel"):
        estimate(request)
