"""Results of the operators whose CUDA kernels lay them out otherwise than torch's meta kernels say.

A stride decides whether a later `.contiguous()` copies, and a dtype how much is saved, so these
follow the CUDA code. Results that a CUDA kernel leaves in host memory are `host` tensors here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from estimator.units import round_up
from profiler import quantized
from profiler.checkpointing import TO_DEVICE, TO_HOST

aten = torch.ops.aten

# aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h, kAlignLSE.
_LSE_ALIGNMENT: Final = 32


class Kernels:
    """The replaced operators.

    Args:
        host: keeps a tensor out of the count of device memory.
    """

    def __init__(self, host: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._host = host
        self._packed: Final = quantized.kernels()
        self._table: Final[dict[Any, Callable[..., Any]]] = {
            aten._scaled_dot_product_flash_attention.default: self._flash,
            aten._scaled_dot_product_flash_attention_backward.default: self._flash_backward,
            aten._scaled_dot_product_efficient_attention.default: self._efficient,
            aten._scaled_dot_product_efficient_attention_backward.default: (
                self._efficient_backward
            ),
            aten._flash_attention_forward.default: self._flash_package,
            aten._flash_attention_backward.default: self._flash_backward,
            aten.native_layer_norm.default: self._layer_norm,
            TO_HOST: self._to_host,
            TO_DEVICE: self._to_device,
        }

    def get(self, func: Any) -> Callable[..., Any]:
        """Return what stands for an operator; the operator itself for most."""
        kernel: Callable[..., Any] | None = self._table.get(func)
        return kernel or self._packed.get(func.name(), func)

    def _flash(
        self, query: Any, key: Any, value: Any, dropout_p: float = 0.0, *_: Any, **__: Any
    ) -> Any:
        """Follow mha_fwd of flash_attn/flash_api.cpp: the output is laid out as the query is."""
        batch, heads, seq_len, _ = query.shape
        out = torch.empty_like(query)
        logsumexp = query.new_empty(batch, heads, seq_len, dtype=torch.float32)
        rng_state = query.new_empty(2, dtype=torch.uint64)
        unused = query.new_empty((), dtype=torch.uint64)
        debug_mask = query.new_empty(0)
        return out, logsumexp, None, None, seq_len, key.shape[2], rng_state, unused, debug_mask

    def _flash_backward(
        self, grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
    ) -> Any:
        """Follow mha_bwd of flash_attn/flash_api.cpp: gradients like the inputs."""
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    def _flash_package(self, query: Any, *_: Any, **__: Any) -> Any:
        """Follow mha_fwd and mha_varlen_fwd of the package: [b, s, H, d] or [t, H, d]."""
        heads = query.shape[-2]
        rows = (
            (query.shape[0], heads, query.shape[1])
            if query.dim() == 4
            else (
                heads,
                query.shape[0],
            )
        )
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        logsumexp = query.new_empty(rows, dtype=torch.float32)
        rng_state = query.new_empty(2, dtype=torch.uint64)
        unused = self._host(query.new_empty((), dtype=torch.uint64))
        return out, logsumexp, rng_state, unused, query.new_empty(0)

    def _efficient(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any,
        compute_lse: bool,
        *_: Any,
        **__: Any,
    ) -> Any:
        """Follow _efficient_attention_forward of cuda/attention.cu: seeds stay on the host."""
        batch, heads, seq_len, _head_dim = query.shape
        out = query.new_empty(batch, seq_len, heads, value.shape[-1]).transpose(1, 2)
        rows = round_up(seq_len, _LSE_ALIGNMENT) if compute_lse else 0
        logsumexp = query.new_empty(batch, heads, rows, dtype=torch.float32)
        seed = self._host(torch.empty((), dtype=torch.int64))
        offset = self._host(torch.empty((), dtype=torch.int64))
        return out, logsumexp, seed, offset

    def _efficient_backward(
        self, grad_out: Any, query: Any, key: Any, value: Any, attn_bias: Any, *rest: Any, **__: Any
    ) -> Any:
        """Follow _efficient_attention_backward of cuda/attention_backward.cu."""
        mask = rest[5]
        gradients = [
            tensor.new_empty(
                tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]
            ).transpose(1, 2)
            for tensor in (query, key, value)
        ]
        bias = None
        if mask[3] and attn_bias is not None:
            *outer, width = attn_bias.shape
            bias = attn_bias.new_empty(*outer, round_up(width, 16))[..., :width]
        return (*gradients, bias)

    def _to_host(self, tensor: Any) -> Any:
        """Follow pack_to_cpu of torch/autograd/graph.py, save_on_cpu: contiguous, pinned."""
        return self._host(tensor.new_empty(tensor.shape))

    def _to_device(self, tensor: Any) -> Any:
        """Follow unpack_from_cpu of torch/autograd/graph.py, save_on_cpu."""
        return tensor.new_empty(tensor.shape)

    def _layer_norm(
        self, tensor: Any, normalized_shape: list[int], weight: Any, bias: Any, eps: float
    ) -> Any:
        """Follow layer_norm_cuda of cuda/layer_norm_kernel.cu: statistics are fp32."""
        rows = tensor.shape[: tensor.dim() - len(normalized_shape)]
        shape = (*rows, *(1 for _ in normalized_shape))
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return (
            torch.empty_like(tensor, memory_format=torch.contiguous_format),
            tensor.new_empty(shape, dtype=dtype),
            tensor.new_empty(shape, dtype=dtype),
        )
