"""Quantization-aware training: torchao's own layers, which run on fake tensors as they are."""

from __future__ import annotations

from typing import Any

from estimator.request import EstimateRequest


def convert(model: Any, request: EstimateRequest) -> None:
    """Replace the linear layers of a meta model, where the request asks for it.

    On the meta device torchao leaves new layers without the old weights, so they are put back.

    Source: torchao, quantization/qat/api.py, QATConfig.
    """
    if request.qat is None:
        return
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    qat = request.qat
    weights = IntxFakeQuantizeConfig(
        getattr(torch, qat.weight_dtype), group_size=qat.group_size, is_symmetric=True
    )
    inputs = None
    if qat.activation_dtype is not None:
        dtype = getattr(torch, qat.activation_dtype)
        inputs = IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False)
    held = {
        path: (module.weight, module.bias)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    for path, (weight, bias) in held.items():
        module = model.get_submodule(path)
        module.weight, module.bias = weight, bias
