"""QAT: what a fake-quantized layer saves and keeps, against torchao's own; what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.techniques.qat import FakeQuantizedProduct
from tests.conformance.cases import MODELS


def _resolved(config: dict[str, Any], **document: Any) -> Any:
    request = parse_request({"model": {"config": config}, "qat": "torchao", **document})
    return resolve(request, config, "m")


@pytest.fixture
def real_layer():
    torch = pytest.importorskip("torch")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16))
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(layer, qat.QATConfig(activation_config=inputs, weight_config=weights))
    return layer


@pytest.mark.filterwarnings("ignore")
def test_the_real_layer_saves_six_bytes_of_each_weight_and_input(real_layer):
    """What `fake_quantize` says of upstream: fp32 before the clamp, and the rounded factor."""
    import torch

    saved: list[Any] = []
    x = torch.ones(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda each: each):
        real_layer(x)
    large = {(tuple(each.shape), each.dtype) for each in saved if each.numel() >= 640}
    assert large == {
        ((2, 5, 64), torch.float32),
        ((10, 64), torch.bfloat16),
        ((96, 2, 32), torch.float32),
        ((64, 96), torch.bfloat16),
    }


@pytest.mark.filterwarnings("ignore")
def test_the_real_layer_keeps_the_scales_that_we_count(real_layer):
    import torch

    real_layer(torch.ones(2, 5, 64, dtype=torch.bfloat16))
    real = real_layer[0].weight_fake_quantizer
    ours = Linear(name="l", fan_in=dim("k", 64), fan_out=dim("n", 96), dtype=DType.BFLOAT16)
    kept = {each.name: each.bytes for each in FakeQuantizedProduct(32, True).weights(ours)}
    assert kept == {
        "weight_fake_quantizer.scale": real.scale.nbytes,
        "weight_fake_quantizer.zero_point": real.zero_point.nbytes,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lora"}, "use method full"),
        ({"method": "qlora"}, "quantized"),
        ({"fp8": "torchao"}, "use method full"),
        ({"loss": "chunked"}, "use loss 'standard'"),
    ],
)
def test_what_has_no_source_is_refused_by_name(changes, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _resolved(MODELS["llama-mha"], **changes)


def test_groups_that_do_not_divide_a_row_are_refused_as_torchao_does():
    with pytest.raises(InvalidRequestError, match="3016"):
        _resolved(MODELS["llama"])
