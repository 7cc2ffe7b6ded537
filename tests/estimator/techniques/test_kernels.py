"""Replacement kernels: which loss they bring, and which models they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.result import Result

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1152, "intermediate_size": 3016, "vocab_size": 50_021,
    "num_hidden_layers": 5, "num_attention_heads": 18, "num_key_value_heads": 6,
}  # fmt: skip
STARCODER2: dict[str, Any] = {
    "model_type": "starcoder2", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def _answer(config: dict[str, Any], **recipe: Any) -> Result:
    request = parse_request({"model": {"config": config}, **recipe})
    return answer(request, config, "model", None)


def test_liger_brings_its_loss_as_use_liger_kernel_does():
    assert parse_request({"model": "gpt2", "kernels": ["liger"]}).loss == "fused_linear"


def test_a_loss_that_is_named_beside_liger_stays():
    named = parse_request({"model": "gpt2", "kernels": ["liger"], "loss": "standard"})
    assert named.loss == "standard"


def test_the_peak_of_a_step_with_liger_is_what_its_own_code_allocates():
    # Dry run of liger-kernel 0.8.5 with transformers 5.23.0 (torch 2.13.0): 3 x 1000 tokens, LoRA
    # on a five-layer Llama, `python -m estimator dry-run`.
    found = _answer(
        LLAMA,
        kernels=["liger"],
        micro_batch_size=3,
        seq_len=1000,
        method={"name": "lora", "r": 12},
        attention="flash_attention_2",
    )
    assert found.peak.allocated_bytes.expected == pytest.approx(1_428_606_976, rel=1e-3)


def test_a_kernel_that_nobody_knows_is_refused_by_name():
    with pytest.raises(UnsupportedCombinationError, match=r"xformers.*known: liger"):
        _answer(LLAMA, kernels=["xformers"])


def test_liger_refuses_a_model_that_it_does_not_patch():
    with pytest.raises(UnsupportedCombinationError, match="starcoder2"):
        _answer(STARCODER2, kernels=["liger"], loss="standard")


def test_liger_refuses_an_activation_for_which_it_has_no_kernel():
    with pytest.raises(UnsupportedCombinationError, match="relu"):
        _answer({**LLAMA, "hidden_act": "relu"}, kernels=["liger"], loss="standard")
