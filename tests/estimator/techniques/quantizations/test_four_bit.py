"""4-bit weights: what a layer stores, against bitsandbytes' own packing of a real matrix."""

from __future__ import annotations

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.techniques.quantizations.four_bit import DTYPES, FourBit


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 96), (192, 40), (320, 257)])
def test_a_layer_stores_what_bitsandbytes_stores(storage, double_quant, fan_in, fan_out):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(fan_out, fan_in),
        quant_type="nf4",
        compress_statistics=double_quant,
        quant_storage=getattr(torch, storage),
    )
    ours = Linear(name="l", fan_in=dim("k", fan_in), fan_out=dim("n", fan_out))
    layout = FourBit(double_quant, DType.FLOAT32, DType.FLOAT32, DTYPES[storage])
    stored = {each.name: each for each in layout.weights(ours)}
    assert stored["weight"].bytes == packed.nbytes
    assert stored["weight"].dtype.label == storage
    assert stored["weight.absmax"].bytes == state.absmax.nbytes
    assert stored["weight.code"].bytes == state.code.nbytes
    if double_quant:
        assert stored["weight.nested_absmax"].bytes == state.state2.absmax.nbytes
        assert stored["weight.nested_code"].bytes == state.state2.code.nbytes
        assert stored["weight.offset"].bytes == state.offset.nbytes
    assert sum(each.parameters for each in stored.values()) == fan_in * fan_out


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 101,
}  # fmt: skip


def test_adapters_beside_packed_weights_take_the_type_that_trl_casts_them_to():
    method = {"name": "lora", "adapter_dtype": "bfloat16"}
    document = {"model": "m", "method": method, "quantization": "nf4"}
    spec = resolve(parse_request(document), LLAMA, "m").spec
    found = {weight.dtype for _, weight, _ in spec.tensors() if weight.trainable}
    assert found == {DType.BFLOAT16}


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_that_cast_makes_of_other_trained_parts_is_refused(more):
    method = {"name": "lora", "adapter_dtype": "bfloat16", **more}
    document = {"model": "m", "method": method, "quantization": "nf4"}
    with pytest.raises(UnsupportedCombinationError, match="bfloat16"):
        resolve(parse_request(document), LLAMA, "m")
