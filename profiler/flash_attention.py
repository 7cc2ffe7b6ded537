"""What stands for the `flash-attn` package, which cannot be installed without a GPU.

torch carries the same kernels as `aten::_flash_attention_forward` and `_flash_attention_backward`;
they take and save what the package's `FlashAttnFunc` and `FlashAttnVarlenFunc` take and save.

FlashAttention 3 is a function of our own, with the buffers of its host code.

Source: flash-attn 2.8, flash_attn/flash_attn_interface.py; FlashAttention 3 at commit 000090d02f03,
hopper/flash_attn_interface.py and hopper/flash_api.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from estimator.units import round_up


def functions(
    implementation: str | None = None, *_: Any, **__: Any
) -> tuple[Callable[..., Any] | None, ...]:
    """Return what transformers imports from the package, in its order."""
    from transformers import modeling_flash_attention_utils as upstream

    if implementation == "flash_attention_3":
        return (
            flash_attn_3_func,
            flash_attn_3_varlen_func,
            None,
            upstream._pad_input,
            upstream._unpad_input,
        )
    return (
        flash_attn_func,
        flash_attn_varlen_func,
        None,
        upstream._pad_input,
        upstream._unpad_input,
    )


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """Attend within each row of a batch [b, s, heads, head_dim]."""
    return _attend(q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, softmax_scale, causal)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend within each sequence of a ragged batch [tokens, heads, head_dim]."""
    return _attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"FlashAttention only supports fp16 and bf16, not {q.dtype}")
    head_dim = q.shape[-1]
    if head_dim % 8:
        pad = (0, 8 - head_dim % 8)
        q, k, v = (torch.nn.functional.pad(tensor, pad) for tensor in (q, k, v))
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        causal,
        False,
        scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
    )[0]
    return out if out.shape[-1] == head_dim else out[..., :head_dim]


def flash_attn_3_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attend within each row of a batch [b, s, heads, head_dim] with FlashAttention 3."""
    out: torch.Tensor = _Flash3.apply(q, k, v, None)
    return out


def flash_attn_3_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attend within each sequence of a ragged batch [tokens, heads, head_dim]."""
    out: torch.Tensor = _Flash3.apply(q, k, v, cu_seqlens_q)
    return out


class _Flash3(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """What FlashAttention 3 allocates and saves on a GPU of compute capability 9, causally."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Follow mha_fwd: the output is contiguous, and without splits nothing else is made."""
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"FlashAttention only supports fp16 and bf16, not {q.dtype}")
        if q.shape[-1] % 8:
            raise ValueError("head_size should be a multiple of 8")
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        *outer, tokens, heads, _ = q.shape
        logsumexp = q.new_empty((*outer, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens)
        return out

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Follow _backward and mha_bwd; the buffers live until the call returns."""
        q, k, v, _out, _logsumexp, cu_seqlens = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        width = next(each for each in (64, 96, 128, 192, 256) if q.shape[-1] <= each)
        query_block = 128 if width <= 64 else 64
        key_block = 128 if width <= 128 else 96 if width <= 192 else 80

        def rows(tensor: torch.Tensor, block: int, *last: int) -> torch.Tensor:
            *outer, tokens, heads, _ = tensor.shape
            if cu_seqlens is not None:
                tokens += (cu_seqlens.shape[0] - 1) * block
            shape = (*outer, heads, round_up(tokens, block), *last)
            return tensor.new_empty(shape, dtype=torch.float32)

        buffers = [rows(q, query_block), rows(q, query_block), rows(q, query_block, width)]
        if q.shape[-2] != k.shape[-2]:
            buffers += [rows(k, key_block, width), rows(k, key_block, width)]
        buffers.clear()
        return dq, dk, dv, None
