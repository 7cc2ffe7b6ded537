"""torchao's 8-bit weights: what a layer stores and saves, against torchao's own tensor."""

from __future__ import annotations

import logging

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.techniques.quantizations.torchao_int8 import WeightOnly


@pytest.fixture
def real_layer():
    torch = pytest.importorskip("torch")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    quantization = pytest.importorskip("torchao.quantization")

    def build(fan_in, fan_out):
        layer = torch.nn.Linear(fan_in, fan_out, bias=False, dtype=torch.bfloat16)
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
        return layer

    return build


def _parts(weight):
    names, _ = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 96), (96, 40)])
def test_a_layer_stores_what_torchao_stores(real_layer, fan_in, fan_out):
    real = _parts(real_layer(fan_in, fan_out).weight)
    ours = Linear(name="l", fan_in=dim("k", fan_in), fan_out=dim("n", fan_out))
    stored = {each.name: each.bytes for each in WeightOnly(DType.BFLOAT16).weights(ours)}
    assert stored == {
        "weight": real["qdata"].nbytes,
        "weight.scale": real["scale"].nbytes,
        "weight.zero_point": real["zero_point"].nbytes,
    }


@pytest.mark.filterwarnings("ignore")
def test_the_real_layer_saves_its_weight_in_floats(real_layer):
    """What `WeightOnly.forward` says of upstream, on upstream's own code."""
    import torch

    layer, saved = real_layer(64, 96), []
    x = torch.ones(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda each: each):
        layer(x)
    assert sorted((tuple(each.shape), each.dtype) for each in saved) == [
        ((64, 96), torch.bfloat16),
        ((96,), torch.bfloat16),
    ]


def test_layers_that_multiply_by_their_weight_themselves_are_refused():
    config = {
        "model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99,
        "num_hidden_layers": 2,
    }  # fmt: skip
    document = {"model": "m", "method": "lora", "quantization": "torchao_int8"}
    with pytest.raises(UnsupportedCombinationError, match="falcon"):
        resolve(parse_request(document), config, "m")


def test_conv1d_layers_of_gpt2_keep_their_width_and_the_answer_says_so():
    config = {
        "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99,
        "n_positions": 128,
    }  # fmt: skip
    document = {"model": "m", "method": "lora", "quantization": "torchao_int8"}
    assert any("keep their full width" in note for note in _notes(config, document))


def _notes(config, document):
    return resolve(parse_request(document), config, "m").spec.notes
