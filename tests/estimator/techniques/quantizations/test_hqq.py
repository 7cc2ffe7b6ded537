"""HQQ weights: what a layer stores, as counted on hqq's own layers, and what is refused."""

from __future__ import annotations

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from estimator.techniques.quantizations.hqq import Hqq

# `nbytes` of W_q, scale and zero of hqq 0.2.8.post1's HQQLinear with a compute_dtype of bf16:
# bits, group, axis, in, out.
COUNTED = {
    (4, 64, 1, 128, 256): (16_384, 1_024, 1_024),
    (4, 64, 0, 192, 96): (9_216, 576, 576),
    (8, 64, 0, 128, 256): (32_768, 1_024, 1_024),
    (3, 64, 1, 192, 96): (7_424, 576, 576),
    (2, 32, 1, 128, 64): (2_048, 512, 512),
    (1, 64, 0, 128, 64): (1_024, 256, 256),
}

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 99,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(("layer", "counted"), COUNTED.items())
def test_a_layer_stores_what_hqq_stores(layer, counted):
    bits, group, axis, fan_in, fan_out = layer
    ours = Linear(name="l", fan_in=dim("k", fan_in), fan_out=dim("n", fan_out))
    stored = Hqq(bits, group, axis == 1, DType.BFLOAT16).weights(ours)
    assert tuple(each.bytes for each in stored) == counted
    assert sum(each.parameters for each in stored) == fan_in * fan_out


def _request(**fields):
    document = {"method": "lora", "quantization": "hqq", **fields}
    return parse_request({"model": {"config": CONFIG}, **document})


def _resolved(**fields):
    return resolve(_request(**fields), CONFIG, "m")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": {"name": "hqq", "bits": 5}}, "use bits 8, 4, 3, 2 or 1"),
        ({"quantization": {"name": "hqq", "group_size": 20}}, "multiple of 8"),
        ({"quantization": {"name": "hqq", "group_size": 1000}}, "another group_size"),
        ({"method": {"name": "lora", "use_dora": True}}, "use_dora"),
        ({"method": {"name": "lora", "lora_bias": True}}, "lora_bias"),
        ({"method": "vera"}, "use lora"),
    ],
)
def test_what_has_no_source_is_refused_with_what_to_use_instead(fields, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _resolved(**fields)


@pytest.mark.parametrize(("precision", "autocast"), [("fp32", "bf16"), ("bf16", "fp16")])
def test_autocast_that_backward_would_fail_on_is_refused(precision, autocast):
    with pytest.raises(UnsupportedCombinationError, match="does not cast"):
        estimate(_request(precision=precision, autocast=autocast))


def test_the_answer_says_who_quantizes():
    assert any("AutoHQQHFModel" in each for each in _resolved().spec.notes)
