"""What stands for the `flash-attn` package, which cannot be installed without a GPU.

torch carries the same kernels as `aten::_flash_attention_forward` and `_flash_attention_backward`;
they take and save what the package's `FlashAttnFunc` and `FlashAttnVarlenFunc` take and save.

Source: flash-attn 2.8, flash_attn/flash_attn_interface.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def functions(*_: Any, **__: Any) -> tuple[Callable[..., Any] | None, ...]:
    """Return what transformers imports from the package, in its order."""
    from transformers import modeling_flash_attention_utils as upstream

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
