"""The waterfall: it starts naive, ends at the request, and every step is an answer of its own."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.request import EstimateRequest, parse_request
from estimator.service import estimate
from estimator.waterfall import NAIVE, ORDER, WORKLOAD

LLAMA_7B = "meta-llama/Llama-2-7b-hf"
LOWMEM: dict[str, Any] = {
    "model": "meta-llama/Llama-3.2-1B",
    "micro_batch_size": 8,
    "seq_len": 160,
    "optimizer": {"name": "adafactor", "in_backward": True},
    "loss": "cut_cross_entropy",
    "activation_checkpointing": "full",
}
REQUESTS: dict[str, dict[str, Any]] = {
    "nothing but a model": {"model": LLAMA_7B},
    "qlora": {
        "model": LLAMA_7B,
        "method": "qlora",
        "activation_checkpointing": "full",
        "optimizer": "paged_adamw_8bit",
        "hardware": {"gpu": "rtx-4090"},
    },
    "in backward": LOWMEM,
    "kernels and a loop of its own": {
        "model": LLAMA_7B,
        "kernels": ["liger"],
        "loop": {"neftune_noise_alpha": 5.0},
    },
    "TRL": {"model": LLAMA_7B, "software": "trl"},
    "without backward": {"model": "gpt2", "seq_len": 512, "method": "mezo", "precision": "fp32"},
}


def _steps(name: str) -> Any:
    result = estimate({**REQUESTS[name], "waterfall": True})
    return result, result.waterfall


def test_a_request_that_does_not_ask_gets_none():
    assert estimate({"model": "gpt2", "seq_len": 512}).waterfall == ()


@pytest.mark.parametrize("name", REQUESTS)
def test_it_ends_at_what_the_request_needs(name):
    result, steps = _steps(name)
    assert steps[-1].needed_bytes == result.peak.needed_bytes.expected
    assert steps[-1].verdict == result.verdict
    saved = sum(step.saves_bytes for step in steps)
    assert steps[0].needed_bytes - saved == steps[-1].needed_bytes


@pytest.mark.parametrize("name", REQUESTS)
def test_every_step_is_what_a_request_with_these_changes_needs(name):
    """The changes, put into the start one after the other, are documents that anybody may send."""
    _, steps = _steps(name)
    asked = parse_request(REQUESTS[name])
    document = {field: asked.to_dict()[field] for field in WORKLOAD if field != "waterfall"}
    start = {"precision": "amp_bf16", "attention": "eager"}
    start |= {"loss": "chunked"} if name == "TRL" else {"loss": "standard"}
    document |= {**start, "kernels": [], "activation_checkpointing": "none", "autocast": None}
    document["optimizer"] = {"name": "adamw", "implementation": "foreach"}
    for step in steps:
        document |= step.change
        assert step.needed_bytes == estimate(document).peak.needed_bytes.expected


def test_the_naive_start_of_a_7b_model_needs_16_bytes_for_each_parameter():
    """7 x 4 x 4 = 112 GB for a 7B model, as tatsu-lab/stanford_alpaca#322 derives it.

    Beside them: a foreach copy of the weights, activations, the context of the device, and a tenth
    that the allocator cannot give back.
    """
    start = _steps("nothing but a model")[1][0]
    states = 16 * 6_738_415_616
    assert states < start.needed_bytes < 1.1 * states * 20 / 16 + 8 * 2**30


def test_techniques_come_in_the_order_in_which_one_would_try_them():
    _, steps = _steps("qlora")
    assert [step.summary for step in steps] == [
        "naive full fine-tuning",
        "attention sdpa",
        "activation checkpointing full",
        "precision bf16",
        "optimizer paged_adamw_8bit",
        "method lora, r=16",
        "quantization nf4",
    ]
    classes = ["none", "none", "slower", *["changes training"] * 4]
    assert [step.cost for step in steps] == classes
    assert all(step.price for step in steps)


def test_what_a_technique_is_worth_is_what_the_run_needs_without_it():
    result, steps = _steps("qlora")
    without = {**REQUESTS["qlora"], "activation_checkpointing": "none"}
    more = estimate(without).peak.needed_bytes.expected - result.peak.needed_bytes.expected
    checkpointing = next(each for each in steps if "checkpointing" in each.summary)
    # The peak is the optimizer's step; what cannot be given back differs by 194 MiB in the dry run.
    assert abs(checkpointing.saves_bytes) < 256 * 2**20
    assert checkpointing.worth_bytes == more > 10 * 2**30


def test_a_technique_that_the_rest_has_no_answer_without_has_no_worth():
    _, steps = _steps("qlora")
    lora = next(each for each in steps if each.summary.startswith("method lora"))
    assert lora.worth_bytes is None


def test_software_that_cannot_start_naively_starts_where_it_can():
    document = {
        "model": LLAMA_7B,
        "software": "litgpt",
        "method": {"name": "lora", "target_modules": ["attn"], "adapter_dtype": "base"},
        "waterfall": True,
    }
    steps = estimate(document).waterfall
    assert steps[0].summary == "where this can start"
    assert "method lora" in steps[0].price


def test_every_field_of_the_request_is_work_or_a_technique():
    """A new field has to say which, or nobody learns what it saves."""
    asked = {"optimizer": "lion", "precision": "fp32", "autocast": "bf16", "method": "qlora"}
    asked |= {"activation_checkpointing": "full", "attention": "sdpa", "loss": "chunked"}
    asked |= {"kernels": ["liger"], "loop": {"use_cache": True}, "fp8": "torchao"}
    asked |= {"qat": "torchao"}
    full = parse_request({"model": LLAMA_7B, **asked})
    naive = EstimateRequest(model=LLAMA_7B, **NAIVE)
    reached = {"autocast"}
    for change_of in ORDER:
        change = change_of(naive, full)
        reached |= set(change.fields) if change else set()
    assert reached | set(WORKLOAD) == set(EstimateRequest.__struct_fields__)
