"""A stand-in for Transformer Engine's linear layer: the tensors that its host code allocates.

The library cannot be imported without CUDA. Accelerate's own conversion runs over this class, and
autograd, autocast and checkpointing are torch's; only what `_Linear` allocates is written down
here, for the layout of Ada and Hopper, where factors are kept transposed as well.

Source: Transformer Engine at commit d0067d0da6cb, pytorch/module/linear.py, `_linear_forward_impl`
and `_linear_backward`; pytorch/csrc/quantizer.cpp, `Float8Quantizer::create_tensor`;
pytorch/quantization.py, `DelayedScalingRecipeState`; pytorch/cpp_extensions/gemm.py,
`get_cublas_workspace_size_bytes`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final
from unittest import mock

import torch

from profiler import stand_ins

_HOPPER_WORKSPACE: Final = (32 << 20) + (1 << 10)
_FORWARD_TENSORS: Final = 3
_BACKWARD_TENSORS: Final = 2


class _Products(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """`_Linear` of the library, without its kernels."""

    @staticmethod
    def forward(ctx: Any, weight: Any, tensor: Any, kind: Any, turns: bool) -> Any:
        x_scale, _x_rows, x_columns = _quantized(tensor, turns)
        w_scale, w_rows, w_columns = _quantized(weight, turns and tensor.requires_grad)
        out = tensor.new_empty(*tensor.shape[:-1], weight.shape[0], dtype=kind)
        ctx.save_for_backward(x_columns, w_rows, w_columns, x_scale, w_scale)
        ctx.shapes, ctx.kind = (weight.shape, tensor.shape), kind
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        x_columns, *_ = ctx.saved_tensors
        weight_shape, tensor_shape = ctx.shapes
        held = _quantized(gradient, True)
        into_tensor = None
        if ctx.needs_input_grad[1]:
            into_tensor = gradient.new_empty(tensor_shape, dtype=ctx.kind)
        into_weight = gradient.new_empty(weight_shape, dtype=ctx.kind)
        # `clear_tensor_data` of the library, on its own copy of the input.
        x_columns.data = x_columns.new_empty(0)
        del held
        return into_weight, into_tensor, None, None


def _quantized(tensor: Any, turns: bool) -> tuple[Any, Any, Any]:
    """Return a scale, the values in 8 bits, and the same transposed if another product needs it."""
    scale = tensor.new_empty(1, dtype=torch.float32)
    rows = tensor.new_empty(tensor.shape, dtype=torch.uint8)
    shape = (tensor.shape[-1], *tensor.shape[:-1])
    return scale, rows, tensor.new_empty(shape, dtype=torch.uint8) if turns else None


class Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """`te.Linear` as Accelerate builds it."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, params_dtype: Any = None
    ) -> None:
        super().__init__()
        if bias:
            raise NotImplementedError("the bias of a te.Linear is not described")
        empty = torch.empty(out_features, in_features, dtype=params_dtype, device="meta")
        self.weight = torch.nn.Parameter(empty)

    def remember(self, steps: int) -> None:
        """Make the state of delayed scaling."""
        for way, count in (("fwd", _FORWARD_TENSORS), ("bwd", _BACKWARD_TENSORS)):
            scale = torch.ones(count, dtype=torch.float32, device="meta")
            history = torch.zeros(steps, count, dtype=torch.float32, device="meta")
            self.register_buffer(f"{way}_scale", scale)
            self.register_buffer(f"{way}_amax_history", history)

    def forward(self, tensor: Any) -> Any:
        """Multiply; the type of the output is autocast's, where that runs."""
        kind = tensor.dtype
        if torch.is_autocast_enabled():
            kind = torch.get_autocast_gpu_dtype()
        return _Products.apply(self.weight, tensor.contiguous(), kind, torch.is_grad_enabled())


def convert(model: Any, history: int) -> None:
    """Run Accelerate's conversion of a meta model with the stand-in in the library's place."""
    from accelerate.utils import transformer_engine

    pytorch = stand_ins.module(
        "transformer_engine.pytorch", Linear=Linear, LayerNorm=torch.nn.LayerNorm
    )
    library = stand_ins.module("transformer_engine", pytorch=pytorch)
    with (
        stand_ins.imported({each.__name__: each for each in (library, pytorch)}),
        mock.patch.multiple(
            transformer_engine,
            is_transformer_engine_available=mock.Mock(return_value=True),
            # It asks for DeepSpeed's state, which a single process has none of.
            GatheredParameters=lambda *_, **__: contextlib.nullcontext(),
        ),
        torch.no_grad(),
    ):
        transformer_engine.convert_model(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.remember(history)
    workspace = torch.empty(_HOPPER_WORKSPACE, dtype=torch.uint8, device="meta")
    model.register_buffer("transformer_engine_workspace", workspace)
