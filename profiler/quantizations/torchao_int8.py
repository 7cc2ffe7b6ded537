"""8-bit base weights as torchao stores them: a tensor subclass whose parts are plain tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

LIBRARY: Final = "torchao"
# Scale of random integers: the weights come out about as large as trained ones.
_SCALE: Final = 0.0003


def with_linears(model: Any, quantization: Any, stored: str) -> Any:
    """Quantize the linear layers of a meta model, as `from_pretrained` with TorchAoConfig does.

    Source: transformers/quantizers/quantizer_torchao.py, param_needs_quantization;
    integrations/torchao.py, TorchAoQuantize.
    """
    import torch
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    torchao = library()
    kept = HfQuantizer.get_modules_to_not_convert(
        model, list(quantization.skip_modules) or None, model._keep_in_fp32_modules
    )
    config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and should_convert_module(name, kept):
            torchao.quantize_(module, config)
    model.requires_grad_(False)
    model.quantization_method = "torchao"
    return model


def library() -> ModuleType:
    """Return torchao's quantization module."""
    import importlib

    return importlib.import_module("torchao.quantization")


def packs(module: Any) -> bool:
    """Whether a module's own weight is a tensor of torchao's."""
    return type(module._parameters.get("weight")).__module__.startswith("torchao.")


def pack(module: Any, device: str) -> None:
    """Give each part of a layer's weight its storage; the values do not matter.

    Shapes:
        qdata        [n, k]   int8
        scale        [n, 1]   fp32
        zero_point   [n, 1]   int8

    Source: torchao/quantization/quantize_/workflows/int8/int8_tensor.py, Int8Tensor.from_hp.
    """
    import torch

    weight = module.weight
    names, context = weight.__tensor_flatten__()
    parts = {
        name: torch.zeros(each.shape, dtype=each.dtype, device=device)
        for name, each in ((name, getattr(weight, name)) for name in names)
    }
    placed = type(weight).__tensor_unflatten__(parts, context, weight.shape, weight.stride())
    module.weight = torch.nn.Parameter(placed, requires_grad=False)


def fill(module: Any) -> None:
    """Give the weight on a real device values of the usual size; no point is shifted."""
    weight = module.weight
    weight.qdata.random_(-127, 128)
    weight.scale.fill_(_SCALE)


def seen_dtype(module: Any) -> Any:
    """Return the type that the weight says it has."""
    return module.weight.dtype


def tensors(_: Any) -> dict[str, Any]:
    """Return what a packed layer keeps beside its parameters: nothing."""
    return {}
