"""Codes, scales and code books of torchao's optimizers, counted on the real states."""

from __future__ import annotations

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import TOY, kept_in_the_answer, toy_model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch_8bit", "AdamW8bit"),
        ("adamw_torch_4bit", "AdamW4bit"),
        ("adamw_torch_fp8", "AdamWFp8"),
    ],
)
def test_low_bit_states_are_those_that_torchao_makes(name: str, kind: str, precision: str) -> None:
    from torchao import optim

    model = toy_model(precision)
    optimizer = getattr(optim, kind)(list(model.parameters()), block_size=256)
    real = 0
    for parameter in model.parameters():
        for signed in (True, False):
            state = optimizer._new_buffer(parameter, signed)
            parts = getattr(state, "tensor_attrs", ())
            tensors = [getattr(state, part) for part in parts] or [state]
            real += sum(each.nbytes for each in tensors)
    assert kept_in_the_answer({"name": name}, precision) == real


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torchaos_own_adamw_keeps_two_moments_in_the_type_of_the_weight(precision: str) -> None:
    from torchao.optim import adam

    model = toy_model(precision)
    optimizer = adam._AdamW(list(model.parameters()), bf16_stochastic_round=True)
    real = sum(
        optimizer._new_buffer(parameter, signed).nbytes
        for parameter in model.parameters()
        for signed in (True, False)
    )
    asked = {"name": "torchao_adamw", "bf16_stochastic_round": True}
    assert kept_in_the_answer(asked, precision) == real


@pytest.mark.parametrize("name", ["torchao_cpu_offload", "deepspeed_cpu_adam"])
def test_optimizers_in_host_memory_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match="host memory"):
        estimate({"model": {"config": TOY}, "optimizer": name})


def test_the_answer_says_that_the_compiled_step_is_not_counted() -> None:
    result = estimate({"model": {"config": TOY}, "optimizer": "adamw_torch_4bit"})
    assert any("compiled by inductor" in note for note in result.notes)
