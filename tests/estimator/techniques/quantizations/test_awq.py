"""AWQ weights: what a layer stores, as counted on gptqmodel's own layers, and what is refused."""

from __future__ import annotations

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.techniques.quantizations.awq import Awq

NAMES = ("qweight", "qzeros", "scales")

# `nbytes` of the buffers of gptqmodel 7.7.0's AWQuantLinear: group, in, out.
COUNTED = {
    (128, 256, 96): (12_288, 96, 384),
    (-1, 256, 96): (12_288, 48, 192),
    (32, 192, 64): (6_144, 192, 768),
}

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 99,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 99,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(("layer", "counted"), COUNTED.items())
def test_a_layer_stores_what_gptqmodel_stores(layer, counted):
    group, fan_in, fan_out = layer
    ours = Linear(name="l", fan_in=dim("k", fan_in), fan_out=dim("n", fan_out))
    stored = {each.name: each for each in Awq(group).weights(ours)}
    assert tuple(stored[name].bytes for name in NAMES) == counted
    assert sum(each.parameters for each in stored.values()) == fan_in * fan_out


def _resolved(config=CONFIG, **fields):
    document = {"model": "m", "method": "lora", "quantization": "awq", **fields}
    return resolve(parse_request(document), config, "m")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": {"name": "awq", "group_size": 100}}, "use one of -1, 16, 32, 64, 128"),
        ({"method": {"name": "lora", "use_dora": True}}, "use_dora"),
        ({"method": "vera"}, "use lora"),
    ],
)
def test_what_has_no_source_is_refused_with_what_to_use_instead(fields, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _resolved(**fields)


def test_models_whose_activations_awq_scales_are_refused():
    with pytest.raises(UnsupportedCombinationError, match="scaled activations into gpt_neox"):
        _resolved(NEOX)


def test_outputs_that_the_kernel_does_not_take_are_refused():
    with pytest.raises(UnsupportedCombinationError, match="multiples of 64"):
        _resolved({**CONFIG, "intermediate_size": 544, "hidden_size": 256})


@pytest.mark.parametrize(("prepared", "dtype"), [(True, DType.FLOAT32), (False, DType.FLOAT16)])
def test_a_model_asked_for_in_bf16_is_loaded_in_fp16_and_raised_by_the_preparation(prepared, dtype):
    spec = _resolved(quantization={"name": "awq", "prepare_kbit": prepared}).spec
    assert {each.dtype for each in (*spec.embeddings, *spec.final, spec.head)} == {dtype}


def test_the_head_keeps_its_width_though_other_layers_are_named():
    spec = _resolved(quantization={"name": "awq", "skip_modules": ["down_proj"]}).spec
    packed = {each.name: bool(each.format) for each, _ in spec.module_counts() if _linear(each)}
    assert not packed["lm_head"]
    assert not packed["mlp.down_proj"]
    assert packed["mlp.up_proj"]


def _linear(module):
    return isinstance(module, Linear)
