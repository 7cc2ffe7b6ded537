"""Base weights as gptqmodel holds them: a stand-in, since the package asks for a newer torch.

PEFT's own adapters stand around these layers. What is written here is the tensors that the host
code of gptqmodel 7.7.0 makes while a layer trains, in its order; for GPTQ they were compared once
with those of the real layer: the same buffers, and one saved tensor, the dequantized weight.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from profiler import stack, stand_ins

LIBRARY: Final = "peft"
# gptqmodel, nn_modules/qlinear/gemm_awq.py, AwqGemmFn.forward: FULL_DEQUANT_MATMUL_THRESHOLD, and
# the parts that the kernel for fewer tokens splits a product into.
AWQ_DENSE_TOKENS: Final = 1024
AWQ_SPLITS: Final = 8
_WORD: Final = 32
_BUFFERS: Final = ("qweight", "qzeros", "scales", "g_idx", "bias", "wf")


@cache
def base_class() -> Any:
    """Return the class that PEFT knows gptqmodel's layers by."""
    import torch

    class BaseQuantLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        """What the layers below have in common."""

        SUPPORTS_METHODS: tuple[Any, ...] = ()

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.in_features, self.out_features = inputs, outputs

    return BaseQuantLinear


@cache
def gptq_class() -> Any:
    """Return the stand-in for the layer that trains on GPTQ weights on a GPU.

    Source: gptqmodel, nn_modules/qlinear/tritonv2.py, TritonV2Linear, which runs its base class
    while it trains: torch.py, TorchLinear._forward_eager.
    """
    import torch

    class TritonV2Linear(base_class()):  # type: ignore[misc]  # a class that is made when asked for
        """Dequantizes by one compiled kernel, which allocates its result and nothing beside it."""

        def __init__(self, bits: int, group: int, inputs: int, outputs: int, bias: bool) -> None:
            super().__init__(inputs, outputs)
            groups = 1 if group < 0 else math.ceil(inputs / group)
            shapes = {
                "qweight": ((math.ceil(inputs * bits / _WORD), outputs), torch.int32),
                "qzeros": ((groups, math.ceil(outputs * bits / _WORD)), torch.int32),
                "scales": ((groups, outputs), torch.float16),
                "g_idx": ((inputs,), torch.int32),
                "bias": ((outputs,), torch.float16),
                "wf": ((_WORD // bits,), torch.int32),
            }
            if not bias:
                del shapes["bias"]
                self.bias = None
            for name, (shape, dtype) in shapes.items():
                self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

        @property
        def weight(self) -> Any:
            """Return something with a device and a type: the real layer's says that it is fp16."""
            return self.scales

        def forward(self, x: Any) -> Any:
            """Run the product."""
            rows = x.reshape(-1, x.shape[-1])
            whole = self.scales.new_empty((self.in_features, self.out_features))
            if whole.dtype != rows.dtype:
                whole = whole.to(rows.dtype)
            out = torch.matmul(rows, whole).reshape(*x.shape[:-1], self.out_features)
            del whole
            if self.bias is not None:
                out.add_(self.bias.to(out.dtype))
            return out

    return TritonV2Linear


@cache
def awq_product() -> Any:
    """Return the stand-in for the function that multiplies AWQ weights and has a backward pass.

    Source: gptqmodel, nn_modules/qlinear/gemm_awq.py, AwqGemmFn; the kernels for few tokens and for
    dequantizing in gptqmodel_ext/awq/quantization/gemm_cuda_gen.cu.
    """
    import torch

    def dequantized(packed: Any, scales: Any) -> Any:
        return scales.new_empty((packed.shape[0], scales.shape[1]))

    class AwqGemmFn(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
        """Dequantizes in forward beyond 1024 tokens, and in backward always."""

        @staticmethod
        def forward(ctx: Any, x: Any, packed: Any, zeros: Any, scales: Any, bias: Any) -> Any:
            ctx.save_for_backward(packed, zeros, scales)
            ctx.input_shape = tuple(x.shape)
            rows = x.reshape(-1, x.shape[-1])
            if rows.shape[0] > AWQ_DENSE_TOKENS:
                out = dequantized(packed, scales)
                out = torch.matmul(rows, out.to(dtype=x.dtype))
            else:
                size = (rows.shape[0], scales.shape[1])
                parts = rows.new_empty((AWQ_SPLITS, *size), dtype=torch.float32)
                out = rows.new_empty(size)
                del parts
            out = out if bias is None else out + bias
            return out.reshape(*x.shape[:-1], scales.shape[1])

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            packed, _, scales = ctx.saved_tensors
            whole = dequantized(packed, scales).to(grad.dtype)
            rows = grad.reshape(-1, grad.shape[-1])
            into_input = torch.matmul(rows, whole.transpose(-1, -2)).reshape(ctx.input_shape)
            return into_input, None, None, None, None

    return AwqGemmFn


@cache
def awq_class() -> Any:
    """Return the stand-in for the layer that trains on AWQ weights on a GPU.

    Source: gptqmodel, nn_modules/qlinear/gemm_awq.py, AwqGEMMLinear.
    """
    import torch

    class AwqGEMMLinear(base_class()):  # type: ignore[misc]  # a class that is made when asked for
        """Multiplies in half precision, with scales of the input's type."""

        SUPPORTS_METHODS = (SimpleNamespace(value="awq"),)

        def __init__(self, group: int, inputs: int, outputs: int, bias: bool) -> None:
            super().__init__(inputs, outputs)
            groups, words = 1 if group < 0 else inputs // group, math.ceil(outputs / 8)
            shapes = {
                "qweight": ((inputs, words), torch.int32),
                "qzeros": ((groups, words), torch.int32),
                "scales": ((groups, outputs), torch.float16),
                "bias": ((outputs,), torch.float16),
            }
            if not bias:
                del shapes["bias"]
                self.bias = None
            for name, (shape, dtype) in shapes.items():
                self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

        def forward(self, x: Any) -> Any:
            """Run the product."""
            given = x.dtype
            halves = (torch.float16, torch.bfloat16)
            x = x.to(given if given in halves else torch.float16).contiguous()
            # The scales stay in the type of the last input, as in the real layer.
            self._buffers["scales"] = self._buffers["scales"].to(x.dtype)
            if self.bias is not None:
                self.bias = self.bias.to(x.dtype)
            out = awq_product().apply(x, self.qweight, self.qzeros, self.scales, self.bias)
            return out.to(given)

    return AwqGEMMLinear


def with_linears(model: Any, quantization: Any, stored: str) -> Any:
    """Replace the linear layers that a checkpoint of the request's format holds packed."""
    awq = quantization.name == "awq"
    model = (_with_awq_linears if awq else _with_gptq_linears)(model, quantization, stored)
    model.requires_grad_(False)
    model.quantization_method = quantization.name
    return model


def _with_awq_linears(model: Any, quantization: Any, stored: str) -> Any:
    """Replace the linear layers, as transformers does for an AWQ checkpoint; bf16 becomes fp16.

    Source: transformers, quantizers/quantizer_awq.py; integrations/awq.py, replace_with_awq_linear.
    """
    import torch
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(
        model,
        list(quantization.skip_modules) or None,
        model._keep_in_fp32_modules,
        add_default_skips=True,
    )
    for path, module in list(model.named_modules()):
        if should_convert_module(path, kept) and isinstance(module, torch.nn.Linear):
            sizes = module.in_features, module.out_features
            packed = awq_class()(quantization.group_size, *sizes, module.bias is not None)
            model.set_submodule(path, packed)
    if stored == "bfloat16":
        model.to(torch.float16)
        model.config.dtype = torch.float16
    return model


def _with_gptq_linears(model: Any, quantization: Any, _: str) -> Any:
    """Replace the linear layers inside decoder layers, as optimum does for a GPTQ checkpoint.

    Source: optimum, gptq/quantizer.py, convert_model; gptq/utils.py, get_layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    inside = f"{stack.layers_path(model)}."
    for path, module in list(model.named_modules()):
        conv = isinstance(module, Conv1D)
        if path.startswith(inside) and (conv or type(module) is torch.nn.Linear):
            sizes = module.weight.shape if conv else module.weight.shape[::-1]
            bits, group = quantization.bits, quantization.group_size
            packed = gptq_class()(bits, group, *sizes, module.bias is not None)
            model.set_submodule(path, packed)
    return model


def packs(module: Any) -> bool:
    """Whether a module is one of these layers."""
    return isinstance(module, base_class())


def pack(_: Any, __: str) -> None:
    """Do nothing: the tensors are buffers, which get their storage as all others do."""


def seen_dtype(module: Any) -> Any:
    """Return the type that PEFT takes the weight to have."""
    weight = getattr(module, "weight", None)
    return module.qweight.dtype if weight is None else weight.dtype


def tensors(module: Any) -> dict[str, Any]:
    """Return the tensors of a layer, by name."""
    found = {name: getattr(module, name, None) for name in _BUFFERS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@contextlib.contextmanager
def seen_by_peft() -> Iterator[None]:
    """Let PEFT find the class of these layers where gptqmodel would be."""
    names = (
        "peft.tuners.lora.gptq", "peft.tuners.lora.awq", "peft.utils.other",
        "peft.utils.quantization_utils",
    )  # fmt: skip
    found = [sys.modules[name] for name in names if name in sys.modules]
    layers = "gptqmodel.nn_modules.qlinear"
    made = [stand_ins.module(name) for name in ("gptqmodel", "gptqmodel.nn_modules")]
    made.append(stand_ins.module(layers, BaseQuantLinear=base_class()))
    with contextlib.ExitStack() as patches:
        patches.enter_context(stand_ins.imported({each.__name__: each for each in made}))
        for module in found:
            found_too = mock.patch.object(module, "is_gptqmodel_available", return_value=True)
            patches.enter_context(found_too)
        yield
