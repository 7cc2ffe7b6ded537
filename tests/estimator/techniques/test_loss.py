"""Losses that the software or the loop chooses, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import toy_model

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 500,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_trl_fills_in_what_its_trainer_does_by_default():
    # trl 1.16.0: create_model_from_path (dtype float32), base_config.py (bf16 and
    # gradient_checkpointing True), add_fused_lm_head; TrainingArguments.optim: adamw_torch_fused.
    request = parse_request({"model": "gpt2", "software": "trl"})
    assert (request.precision, request.autocast) == ("fp32", "bf16")
    assert request.activation_checkpointing == "full"
    assert request.loss == "chunked"
    assert request.optimizer.implementation == "fused"


def test_what_a_request_to_trl_says_itself_stays():
    said = {"precision": "bf16", "gradient_checkpointing": False, "kernels": ["liger"]}
    request = parse_request({"model": "gpt2", "software": "trl", **said})
    assert (request.precision, request.autocast) == ("bf16", None)
    assert request.activation_checkpointing == "none"
    assert request.loss == "fused_linear"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"software": "trl", "loss": "standard"}, "head of its own"),
        ({"loop": {"label_smoothing_factor": 0.1}, "loss": "chunked"}, "label_smoothing"),
        ({"loop": {"label_smoothing_factor": 0.1}, "software": {"version": "4"}}, "transformers 5"),
        ({"loop": {"own_loss": True}, "software": {"version": "4"}}, "own_loss"),
        ({"loop": {"own_loss": True}, "method": "prefix_tuning"}, "own_loss"),
        ({"loop": {"own_loss": True}, "method": "mezo"}, "own_loss"),
        ({"loop": {"own_loss": True, "logits_to_keep": 8}}, "logits_to_keep"),
    ],
)
def test_a_loss_that_the_trainer_would_not_run_is_refused(recipe, why):
    request = parse_request({"model": {"config": LLAMA}, **recipe})
    with pytest.raises(UnsupportedCombinationError, match=why):
        answer(request, LLAMA, "model", None)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"loss": "chunked"}, "a loss other than"),
        ({"packing": True}, "packing"),
        ({"method": "prompt_tuning"}, "virtual tokens"),
        ({"method": {"name": "lora", "target_modules": ["q_proj", "lm_head"]}}, "head"),
        ({"software": {"version": "4"}}, "a loss other than"),
    ],
)
def test_logits_to_keep_is_refused_where_the_labels_would_not_match(recipe, why):
    request = parse_request(
        {"model": {"config": LLAMA}, "loop": {"logits_to_keep": 8}, "seq_len": 64, **recipe}
    )
    with pytest.raises(UnsupportedCombinationError, match=why):
        answer(request, LLAMA, "model", None)


def test_more_logits_than_positions_are_refused():
    request = parse_request(
        {"model": {"config": LLAMA}, "loop": {"logits_to_keep": 65}, "seq_len": 64}
    )
    with pytest.raises(InvalidRequestError, match="more than seq_len"):
        answer(request, LLAMA, "model", None)


def test_transformers_refuses_more_labels_than_kept_logits():
    """Why the labels of our batch are cut: the loss compares as many rows as there are logits."""
    torch = pytest.importorskip("torch")
    model = toy_model("fp32")
    ids = torch.zeros((2, 8), dtype=torch.int64)
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=ids, labels=ids, logits_to_keep=3)
    assert model(input_ids=ids, labels=ids[:, -3:], logits_to_keep=3).logits.shape[1] == 3


@pytest.mark.parametrize(("version", "copies"), [("0.27", 1), ("1.3", 2)])
def test_trl_copies_the_logits_for_its_metrics(version, copies):
    """v0.27.0 and v1.3.0, compute_loss: `outputs.logits[..., :-1, :].contiguous()`, fp32."""
    asked = {"model": "meta-llama/Llama-3.1-8B", "micro_batch_size": 2, "seq_len": 4096}
    asked |= {"precision": "bf16", "autocast": "bf16"}
    result = estimate({**asked, "software": {"framework": "trl", "version": version}})
    forward = next(each.bytes for each in result.timeline if each.moment == "loss forward")
    backward = next(each.bytes for each in result.timeline if each.moment == "loss backward")
    # In backward two fp32 tensors of that size lie beside the saved one, as the outputs are gone.
    one_copy = 4 * 2 * 4096 * 128256
    assert forward - backward == pytest.approx((copies - 1) * one_copy, abs=0.01 * one_copy)


def test_old_trl_has_the_models_own_loss_by_default():
    request = parse_request({"model": "gpt2", "software": {"framework": "trl", "version": "0.27"}})
    assert request.loss == "standard"
    assert (request.precision, request.autocast) == ("fp32", "bf16")


SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1152, "intermediate_size": 3016, "vocab_size": 50_021,
    "num_hidden_layers": 5, "num_attention_heads": 18, "num_key_value_heads": 6,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "dry_run"),
    [
        ({}, 3_407_483_904),
        ({"precision": "amp_bf16"}, 4_963_421_696),
    ],
    ids=["bf16", "under autocast"],
)
def test_a_loss_outside_the_model_is_made_in_the_type_of_its_logits(recipe, dry_run):
    document = {
        "model": {"config": SMALL}, "micro_batch_size": 3, "seq_len": 1000,
        "optimizer": "adamw_torch_fused", "loop": {"own_loss": True}, **recipe,
    }  # fmt: skip
    found = answer(parse_request(document), SMALL, "model", None)
    # Dry run with torch 2.13.0 and transformers 5.23.0; allocated bytes.
    assert found.peak.allocated_bytes.expected == pytest.approx(dry_run, rel=2e-3)
    assert found.peak.moment == "loss backward"
