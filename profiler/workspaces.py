"""Memory that CUDA kernels take inside themselves, which no operator's result shows.

One function for each kernel, with its source. Everything here is read from upstream code; the
shapes come from the operator's own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

from estimator.units import round_up
from profiler import quantized
from profiler.checkpointing import TO_HOST
from profiler.quantizations import bnb_4bit

aten = torch.ops.aten

# aten/src/ATen/native/cuda/Embedding.cu, embedding_dense_backward_cuda: up to this many indices
# one kernel adds rows without sorting them.
_EMBEDDING_SORT_ABOVE: Final = 3072
_FLASH_ROUND: Final = 128
_EFFICIENT_REGISTER_WIDTH: Final = 128

_MATMULS: Final = frozenset(
    {
        aten.mm.default,
        aten.mm.out,
        aten.addmm.out,
        aten.bmm.out,
        aten.baddbmm.out,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.addmv.default,
        aten.mv.default,
        aten.mm.out,
        aten.addmm.out,
        # cuBLASLt's workspace is cuBLAS's (torch/backends/cuda/__init__.py, blas_workspace_size).
        aten._scaled_mm.default,
    }
)

Buffers = Iterable[tuple[str, int]]


class Workspaces:
    """The kernels of one GPU.

    Args:
        compute_capability: of the GPU.
        multiprocessors: streaming multiprocessors of the GPU.
        cublas_bytes: workspace of one cuBLAS handle [bytes].
        trained: how many tensors of each type the whole model trains; what is traced may be less.
    """

    def __init__(
        self,
        compute_capability: tuple[int, int],
        multiprocessors: int,
        cublas_bytes: int,
        trained: Mapping[Any, int] | None = None,
    ) -> None:
        self.cublas_bytes = cublas_bytes
        self._trained = trained or {}
        self._device = (compute_capability, multiprocessors)

    def of(self, func: Any, args: tuple[Any, ...], out: Any) -> Buffers:
        """Return the name and size of each buffer that the kernel of an operator takes [bytes]."""
        if func in _TABLE:
            return _TABLE[func](args, out)
        if func is aten._foreach_norm.Scalar:
            return self._foreach_norm(args)
        if func.name() == "bitsandbytes::gemm_4bit":
            return self._gemm_4bit(args)
        if func.name() in quantized.WORKSPACES:
            return quantized.WORKSPACES[func.name()](args, out)
        return ()

    def is_matmul(self, func: Any) -> bool:
        """Whether the operator runs through cuBLAS."""
        return func in _MATMULS

    def _foreach_norm(self, args: tuple[Any, ...]) -> Buffers:
        """Bytes of the partial sums of the norms of a list of gradients.

        Shapes:
            partial sums   [n, c]   fp32: n tensors, c chunks of the largest of them

        Source: aten/src/ATen/native/cuda/ForeachReduceOp.cu, output_per_tensor; kChunkSize of
        MultiTensorApply.cuh.
        """
        tensors = args[0]
        number = self._trained.get(tensors[0].dtype, len(tensors))
        yield "partial sums of norms", 4 * number * max(-(-t.numel() // 65536) for t in tensors)

    def _gemm_4bit(self, args: tuple[Any, ...]) -> Buffers:
        """Bytes that a product with a 4-bit weight takes where the weight is unpacked first.

        Shapes:
            unpacked weight                      [n, k]         as the input
            scales, unpacked, with double quantization   2 x [n * k / 64]   fp32

        Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback`.
        """
        tensor, (out_features, in_features) = args[0], args[2]
        tokens = tensor.numel() // in_features
        if bnb_4bit.is_fused(*self._device, tensor.dtype, tokens, out_features, in_features):
            return
        blocks = -(-out_features * in_features // args[4])
        if len(args) > 7 and args[7] is not None:
            yield "unpacked scales", 4 * blocks
            yield "unpacked scales, shifted", 4 * blocks
        yield "unpacked weight", tensor.element_size() * out_features * in_features


def flash_backward(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes that one flash-attention backward takes beside its three gradients.

    Shapes:
        dq_accum      [b, S128, H, d32]   fp32
        softmax_d     [b, H, S128]        fp32
        dk, dv expanded to all query heads, with grouped heads   [b, S, H, d] x 2

    Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd.
    """
    query, key = args[1], args[2]
    batch, heads, seq_len, head_dim = query.shape
    rounded_len = round_up(seq_len, _FLASH_ROUND)
    rounded_dim = round_up(head_dim, 32 if head_dim <= 128 else 64)
    yield "softmax_d", 4 * batch * heads * rounded_len
    yield "dq_accum", 4 * batch * rounded_len * heads * rounded_dim
    if key.shape[1] != heads:
        expanded = query.element_size() * batch * key.shape[2] * heads * head_dim
        yield "dk_expanded", expanded
        yield "dv_expanded", expanded


def flash_package_backward(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes that the flash-attn package's backward takes beside its three gradients.

    Shapes:
        dq_accum      [b, S128, H, d32] fp32, or for a ragged batch [t + 128 b, H, d32]
        softmax_d     [b, H, S128] fp32, or for a ragged batch [H, t + 128 b]
        dk, dv expanded to all query heads, with grouped heads   as the queries, x 2

    Source: flash-attn 2.8, csrc/flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd.
    """
    query, key, cu_seqlens = args[1], args[2], args[6]
    *_, heads, head_dim = query.shape
    if cu_seqlens is None:
        rows = query.shape[0] * round_up(query.shape[1], _FLASH_ROUND)
    else:
        rows = query.shape[0] + _FLASH_ROUND * (cu_seqlens.shape[0] - 1)
    yield "softmax_d", 4 * heads * rows
    yield "dq_accum", 4 * rows * heads * round_up(head_dim, 32 if head_dim <= 128 else 64)
    if key.shape[-2] != heads:
        expanded = query.element_size() * key.numel() // key.shape[-2] * heads
        yield "dk_expanded", expanded
        yield "dv_expanded", expanded


def efficient_forward(args: tuple[Any, ...], out: Any) -> Buffers:
    """Bytes that memory-efficient attention accumulates its output in, where registers are full.

    Shapes:
        output accumulator, for 16-bit values wider than 128   [b, S, H, d]   fp32

    Source: mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer; the kernels with at
    most 128 columns keep their output in registers.
    """
    value, result = args[2], out[0]
    if value.element_size() == 2 and value.shape[-1] > _EFFICIENT_REGISTER_WIDTH:
        yield "output accumulator", 4 * result.numel()


def efficient_backward(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes that one memory-efficient attention backward takes beside its gradients.

    Shapes:
        delta             [b, H, S]        fp32
        product of grad_out and out, for fp32 inputs   [b, S, H, d]   fp32
        dq accumulator    [b, H, S128, d64]   fp32

    Source: cuda/attention_backward.cu, _efficient_attention_backward (delta), and
    mem_eff_attention/kernel_backward.h, workspace_elements_gq (kEnableSplitKeys).
    """
    query, value = args[1], args[3]
    batch, heads, seq_len, head_dim = query.shape
    yield "delta", 4 * batch * heads * seq_len
    if query.element_size() == 4:
        yield "grad_out x out", 4 * batch * heads * seq_len * value.shape[-1]
    rows, columns = round_up(seq_len, _FLASH_ROUND), round_up(head_dim, 64)
    yield "dq accumulator", 4 * batch * heads * rows * columns


def safe_softmax(args: tuple[Any, ...], out: Any) -> Buffers:
    """Bytes that the softmax of the math attention kernel takes beside its result.

    Fully masked rows are zeroed in the result itself, as torch's own memory profiler shows.

    Shapes:
        test of each score against -inf               as the result, 1 byte

    Source: aten/src/ATen/native/transformers/attention.cpp, _safe_softmax.
    """
    yield "scores that are -inf", out.numel()


def logsumexp(args: tuple[Any, ...], out: Any) -> Buffers:
    """Bytes that logsumexp takes beside its result.

    Shapes:
        maxima, and the test of each against infinity    as the result
        exponentials                                     as the input

    Source: aten/src/ATen/native/ReduceOps.cpp, logsumexp_out_impl.
    """
    tensor = args[0]
    yield "maxima", out.element_size() * out.numel()
    yield "exponentials", tensor.element_size() * tensor.numel()


def multinomial(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes of the noise that one draw from each row divides the probabilities by.

    Source: aten/src/ATen/native/Distributions.cpp, multinomial_out, `q`.
    """
    tensor, samples = args[0], args[1]
    if samples == 1:
        yield "exponential noise", tensor.element_size() * tensor.numel()


def embedding_backward(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes that the backward of one embedding takes beside its gradient.

    Shapes:
        sorted indices, original positions, segment tables   6 x [T]   int64
        grad_weight_per_segment                              [T, h]    fp32

    Source: aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu, embedding_backward_cuda_kernel.
    """
    gradient, indices = args[0], args[1]
    tokens = indices.numel()
    if tokens <= _EMBEDDING_SORT_ABOVE:
        return
    yield "grad_weight_per_segment", 4 * tokens * gradient.shape[-1]
    yield "sorted indices", 6 * 8 * tokens


def copy_to_host(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes of the contiguous copy that a strided tensor takes on its way to the host.

    Source: aten/src/ATen/native/cuda/Copy.cu, copy_kernel_cuda, src_contig.
    """
    (tensor,) = args
    if not tensor.is_contiguous():
        yield "contiguous copy for the host", tensor.element_size() * tensor.numel()


_TABLE: Final[dict[Any, Callable[[tuple[Any, ...], Any], Buffers]]] = {
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten._flash_attention_backward.default: flash_package_backward,
    aten._scaled_dot_product_efficient_attention.default: efficient_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._safe_softmax.default: safe_softmax,
    aten.embedding_dense_backward.default: embedding_backward,
    aten.logsumexp.default: logsumexp,
    aten.multinomial.default: multinomial,
    TO_HOST: copy_to_host,
}
