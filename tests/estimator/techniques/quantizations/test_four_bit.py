"""4-bit weights: what a layer stores, against bitsandbytes' own packing of a real matrix."""

from __future__ import annotations

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.model.spec import Linear
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
