"""Losses that the software or the loop chooses, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.pipeline import answer
from estimator.request import parse_request

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
    ],
)
def test_a_loss_that_the_trainer_would_not_run_is_refused(recipe, why):
    request = parse_request({"model": {"config": LLAMA}, **recipe})
    with pytest.raises(UnsupportedCombinationError, match=why):
        answer(request, LLAMA, "model", None)
