"""Codes, scales and code books of torchao's optimizers, counted on the real states."""

from __future__ import annotations

import pytest

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


def test_the_answer_says_that_the_compiled_step_is_not_counted() -> None:
    result = estimate({"model": {"config": TOY}, "optimizer": "adamw_torch_4bit"})
    assert any("compiled by inductor" in note for note in result.notes)
