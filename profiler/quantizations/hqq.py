"""Base weights as hqq holds them: a stand-in, since PEFT imports hqq, and with it inductor, always.

What is written here is the tensors of hqq 0.2.8.post1 in PyTorch, in its order. A dry run with the
real layer in its place gives the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Final
from unittest import mock

from profiler import stand_ins

LIBRARY: Final = "peft"
# hqq, core/bitpack.py: the values in one element of the packed tensor.
_VALUES: Final = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_LAYERS: Final = "hqq.core.quantize"


@cache
def product() -> Any:
    """Return the stand-in for the function that saves its input and dequantizes twice.

    Source: hqq, core/quantize.py, HQQMatmulNoCacheMul.
    """
    import torch

    class HQQMatmulNoCacheMul(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped
        """Multiplies by whatever the layer dequantizes."""

        @staticmethod
        def forward(x: Any, layer: Any, bias: Any) -> Any:
            out = layer.multiplied(x, transpose=True)
            if bias is not None:
                out += bias
            return out

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            x, ctx.layer, bias = inputs
            ctx.save_for_backward(x, bias)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return ctx.layer.multiplied(grad, transpose=False), None, None

    return HQQMatmulNoCacheMul


@cache
def layer_class() -> Any:
    """Return the stand-in for hqq's layer.

    Source: hqq, core/quantize.py, HQQLinear and Quantizer; core/bitpack.py, BitPack.
    """
    import torch

    class HQQLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        """A packed weight with scales and zero points beside it."""

        def __init__(self, linear: Any, bits: int, group: int, axis: int, dtype: Any) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.bits, self.group, self.axis, self.compute_dtype = bits, group, axis, dtype
            self.zero = self.scale = None
            self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
            rows, columns = self.grouped()
            packed = torch.int32 if bits == 3 else torch.uint8
            codes = torch.empty((-(-rows // _VALUES[bits]), columns), dtype=packed, device="meta")
            self.W_q = torch.nn.Parameter(codes, requires_grad=False)

        def grouped(self) -> tuple[int, int]:
            """Return the shape in which the values are packed row upon row."""
            groups = self.in_features * self.out_features // self.group
            return (groups, self.group) if self.axis == 1 else (self.group, groups)

        def unpacked(self) -> Any:
            """Return the codes, one an element."""
            values, step = _VALUES[self.bits], self.W_q.shape[0]
            if values == 1:
                return self.W_q.to(self.compute_dtype)
            codes = self.W_q.new_empty((values * step, self.W_q.shape[1]), dtype=self.compute_dtype)
            for part in range(values):
                codes[part * step : (part + 1) * step] = (self.W_q & 1) >> 1
            return codes[: self.grouped()[0]]

        def multiplied(self, x: Any, *, transpose: bool) -> Any:
            """Return the product with the dequantized weight."""
            whole = self.unpacked()
            whole = ((whole - self.zero) * self.scale).reshape(self.out_features, self.in_features)
            return torch.matmul(x, whole.t() if transpose else whole)

        def forward(self, x: Any) -> Any:
            """Run the product."""
            return product().apply(x, self, self.bias)

    return HQQLinear


def with_linears(model: Any, quantization: Any, stored: str) -> Any:
    """Replace the linear layers but the head, as hqq's AutoHQQHFModel does.

    Source: hqq, models/base.py, BaseHQQModel.quantize_model.
    """
    import torch

    head, dtype = model.get_output_embeddings(), getattr(torch, stored)
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head:
            asked = quantization.bits, quantization.group_size, quantization.axis
            model.set_submodule(path, layer_class()(module, *asked, dtype))
    model.requires_grad_(False)
    model.hqq_quantized = True
    return model


def packs(module: Any) -> bool:
    """Whether a module is one of these layers."""
    return isinstance(module, layer_class())


def pack(module: Any, device: str) -> None:
    """Give a layer its scales, zero points and bias on a device; the values do not matter."""
    import torch

    rows, columns = module.grouped()
    shape = (rows, 1) if module.axis == 1 else (1, columns)
    dtype = module.compute_dtype
    module.scale = torch.ones(shape, dtype=dtype, device=device)
    module.zero = torch.zeros(shape, dtype=dtype, device=device)
    if module.bias is not None:
        module.bias = torch.zeros(module.bias.shape, dtype=dtype, device=device)


def seen_dtype(module: Any) -> Any:
    """Return the type of the packed weight."""
    return module.W_q.dtype


def tensors(module: Any) -> dict[str, Any]:
    """Return what a packed layer keeps beside its parameter, by name."""
    kept = {"scale": module.scale, "zero": module.zero, "bias": module.bias}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


@cache
def _made_known() -> None:
    """Let PEFT define its adapter for these layers, which it does where hqq can be imported."""
    utils = importlib.import_module("peft.import_utils")
    adapter = importlib.import_module("peft.tuners.lora.hqq")
    made = [stand_ins.module(name) for name in ("hqq", "hqq.core")]
    made.append(stand_ins.module(_LAYERS, HQQLinear=layer_class()))
    with (
        stand_ins.imported({each.__name__: each for each in made}),
        mock.patch.object(utils, "is_hqq_available", return_value=True),
    ):
        importlib.reload(adapter)


@contextlib.contextmanager
def seen_by_peft() -> Iterator[None]:
    """Let PEFT know these layers."""
    _made_known()
    yield
