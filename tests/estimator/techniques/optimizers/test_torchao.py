"""Codes, scales and code books of torchao's optimizers, counted on the real states."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import convert

from estimator.errors import EstimatorError, UnsupportedCombinationError
from estimator.optimizer import Optimizer
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_host_memory_holds_what_torchao_keeps(precision: str, offload_gradients: bool) -> None:
    import torch

    from profiler.cpu_offload import Offloaded

    asked = {
        "name": "torchao_cpu_offload",
        "offload_gradients": offload_gradients,
        "minimal_size": 5000,
    }
    model = toy_model(precision)
    real = Offloaded([{"params": list(model.parameters())}], convert(asked, Optimizer), 1e-5)
    ids = torch.zeros((1, 4), dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    left = [each for each in model.parameters() if each.grad is not None]
    if offload_gradients:
        assert left == [each for each in model.parameters() if each.numel() < 5000]
    real.step()
    states: dict[bool, int] = {True: 0, False: 0}
    for parameter, state in real.state.items():
        states[real.moves(parameter)] += sum(value.nbytes for value in state.values())
    pinned = sum(1 << (each.nbytes - 1).bit_length() for each in real.on_host)
    answer = estimate(
        {"model": {"config": TOY}, "seq_len": 1, "precision": precision, "optimizer": asked}
    )
    assert answer.peak.host_bytes.expected == pinned + states[True]
    assert kept_in_the_answer(asked, precision) == states[False]


def test_dropped_gradients_may_wait_for_their_copies_in_reserved_memory() -> None:
    def high_end_above_the_rest(*, offload_gradients: bool) -> int:
        asked = {"name": "torchao_cpu_offload", "offload_gradients": offload_gradients}
        peak = estimate({"model": {"config": TOY}, "seq_len": 1, "optimizer": asked}).peak
        return peak.reserved_bytes.high - peak.reserved_bytes.expected

    late = sum(2 * each.numel() for each in toy_model("bf16").parameters() if each.numel() >= 4096)
    assert high_end_above_the_rest(offload_gradients=True) >= late


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"gradient_accumulation_steps": 2}, "accumulat"),
        ({"loop": {"set_to_none": False}}, "asserts"),
        ({"precision": "amp_fp16"}, "fp16"),
        ({"precision": "master_bf16"}, "master_bf16"),
        ({"method": "adalora"}, "adalora"),
    ],
)
def test_what_the_optimizer_in_host_memory_does_not_run_with_is_refused(
    document: dict[str, Any], reason: str
) -> None:
    asked = {"name": "torchao_cpu_offload", "offload_gradients": True}
    with pytest.raises(EstimatorError, match=reason):
        estimate({"model": {"config": TOY}, "optimizer": asked, **document})


def test_deepspeeds_optimizer_in_host_memory_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedCombinationError, match=r"ZeRO-Offload.*torchao_cpu_offload"):
        estimate({"model": {"config": TOY}, "optimizer": "deepspeed_cpu_adam"})


def test_the_answer_says_that_the_compiled_step_is_not_counted() -> None:
    result = estimate({"model": {"config": TOY}, "optimizer": "adamw_torch_4bit"})
    assert any("compiled by inductor" in note for note in result.notes)
