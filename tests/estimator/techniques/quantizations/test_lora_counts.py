"""LoRA beside layers of packed checkpoints: what PEFT itself counts as trained, to the integer."""

from __future__ import annotations

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import parse_request
from estimator.service import estimate
from tests.conformance.cases import MODELS
from tests.conformance.counts import counted_by_peft, counted_here

LORA = {"name": "lora", "r": 12}


@pytest.mark.parametrize("model", ["llama-mha", "qwen2", "opt"])
@pytest.mark.parametrize("quantization", ["gptq", "awq", "hqq"])
def test_lora_trains_what_peft_counts(quantization, model):
    pytest.importorskip("peft")
    group = {"group_size": 64} if quantization == "awq" else {}
    packed = {"quantization": {"name": quantization, **group}}
    assert counted_here(LORA, model, **packed)[0] == counted_by_peft(LORA, model, **packed)[0]


def test_a_product_that_is_kept_cannot_be_added_to_in_place():
    """torch: "Tensor cached during selective activation checkpoint has been mutated"."""
    document = {
        "model": {"config": MODELS["qwen2"]}, "method": LORA, "quantization": "gptq",
        "activation_checkpointing": "selective_op",
    }  # fmt: skip
    with pytest.raises((UnsupportedCombinationError, InvalidRequestError), match="in place"):
        estimate(parse_request(document))
