"""AdaLoRA against PEFT: its parameters, its scores, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from estimator.eager.tensor import Regime
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.memory.standing import IMPORTANCE, importance_sizes
from estimator.memory.trace import trace
from estimator.request import parse_request
from estimator.resolve import resolve
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "adalora"},
    {"name": "adalora", "init_r": 5, "target_modules": "all-linear"},
)
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str, method: dict[str, Any]):
    assert counted_here(method, model) == counted_by_peft(method, model)


def test_the_scores_hold_the_bytes_of_those_that_peft_keeps():
    from profiler import workload

    method = {"name": "adalora", "update_and_allocate": True}
    request = parse_request({"model": {"config": TINY}, "method": method, "precision": "fp32"})
    with warnings.catch_warnings():
        # The stack's warnings are about code that is not ours.
        warnings.simplefilter("ignore")
        model = workload.meta_model(request, workload.model_config(TINY))
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
    model.base_model.update_and_allocate(0)
    kept = model.base_model.rankallocator
    theirs = [
        tensor.numel() * tensor.element_size()
        for scores in (kept.ipt, kept.exp_avg_ipt, kept.exp_avg_unc)
        for tensor in scores.values()
    ]
    sizes = importance_sizes(resolve(request, TINY, "tiny"))
    assert sum(size * count for _, size, count in sizes) * len(IMPORTANCE) == sum(theirs)


def test_without_the_call_no_scores_are_kept_and_the_answer_says_so():
    request = parse_request({"model": {"config": TINY}, "method": "adalora"})
    run = resolve(request, TINY, "tiny")
    assert importance_sizes(run) == ()
    assert any("update_and_allocate" in note for note in run.spec.notes)


def test_a_schedule_without_room_for_cutting_is_refused_as_peft_refuses_it():
    method = {"name": "adalora", "total_step": 10, "tinit": 5, "tfinal": 5}
    with pytest.raises(InvalidRequestError, match="total_step"):
        counted_here(method, "llama")
    with pytest.raises(InvalidRequestError, match="PEFT refuses"):
        counted_by_peft(method, "llama")


def test_half_precision_sums_over_int8_are_refused_because_attention_does_not_take_them():
    quantization = {"name": "int8", "prepare_kbit": False}
    document = {"model": {"config": TINY}, "method": "adalora", "quantization": quantization}
    run = resolve(parse_request(document), TINY, "tiny")
    with pytest.raises(UnsupportedCombinationError, match="prepare_kbit"):
        trace(run, Regime())
