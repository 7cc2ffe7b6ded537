"""GPTQ weights: what a layer stores, as counted on gptqmodel's own layers, and what is refused."""

from __future__ import annotations

import pytest

from estimator.eager.size import dim
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.techniques.quantizations.gptq import Gptq

NAMES = ("qweight", "qzeros", "scales", "g_idx", "wf")

# `nbytes` of the buffers of gptqmodel 7.7.0's TorchLinear after `_init_wf_unsqueeze_buffers`, whose
# two views of the shifts share one storage: bits, group, in, out.
COUNTED = {
    (4, 128, 256, 96): (12_288, 96, 384, 1_024, 32),
    (8, -1, 256, 96): (24_576, 96, 192, 1_024, 16),
    (2, 32, 192, 64): (3_072, 96, 768, 768, 64),
    (4, 128, 960, 320): (153_600, 1_280, 5_120, 3_840, 32),
}

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 99,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(("layer", "counted"), COUNTED.items())
def test_a_layer_stores_what_gptqmodel_stores(layer, counted):
    bits, group, fan_in, fan_out = layer
    ours = Linear(name="l", fan_in=dim("k", fan_in), fan_out=dim("n", fan_out))
    stored = {each.name: each for each in Gptq(bits, group).weights(ours)}
    assert tuple(stored[name].bytes for name in NAMES) == counted
    assert sum(each.parameters for each in stored.values()) == fan_in * fan_out


def _resolved(config=CONFIG, **fields):
    document = {"model": "m", "method": "lora", "quantization": "gptq", **fields}
    return resolve(parse_request(document), config, "m")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": {"name": "gptq", "bits": 3}}, "use bits 2, 4 or 8"),
        ({"quantization": {"name": "gptq", "group_size": 100}}, "use one of -1, 16"),
        ({"method": {"name": "lora", "use_dora": True}}, "use_dora"),
        ({"method": {"name": "lora", "bias": "all"}}, "trained biases"),
        ({"software": {"version": "4"}}, "software transformers 5 or trl"),
        ({"quantization": {"name": "gptq", "kernel": "autogptq_triton"}}, "4 or 4.45"),
    ],
)
def test_what_has_no_source_is_refused_with_what_to_use_instead(fields, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _resolved(**fields)


def test_widths_that_the_kernel_does_not_take_are_refused():
    with pytest.raises(UnsupportedCombinationError, match="496 is no multiple of 32"):
        _resolved({**CONFIG, "intermediate_size": 496})


def test_the_head_and_the_embeddings_keep_their_width():
    spec = _resolved().spec
    assert spec.head.format is None
    packed = {
        each.name for each, _ in spec.module_counts() if isinstance(each, Linear) and each.format
    }
    assert packed == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip


def test_the_answer_says_that_the_default_backend_does_not_train():
    assert any("auto_trainable" in each for each in _resolved().spec.notes)
