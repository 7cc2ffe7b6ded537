"""Scaled dot product attention: the kernels that CUDA takes, what they save, their workspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, ONE, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor
from estimator.sources import Cite

_SDPA: Final = Cite("torch-derivatives", "_scaled_dot_product_flash_attention")
_FLASH: Final = Cite("flash-attention", "mha_bwd")
MASK: Final[Shape] = (BATCH, ONE, SEQ, SEQ)


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Head counts and widths of one attention layer."""

    query: Dim
    key_value: Dim
    width: Dim

    @property
    def groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.query.value // self.key_value.value


def flash(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """FlashAttention 2, as SDPA or as its own package: no score matrix is ever kept.

    Shapes:
        saved: q, output     [b, s, H·d]   2 bytes each
        saved: k, v          [b, s, KV·d]  2 bytes each
        saved: log-sum-exp   [b, H, s]     4 bytes

    Source: torch-derivatives, _scaled_dot_product_flash_attention.
    """
    q, k, v = (ops.autocast_to_half(each) for each in (q, k, v))
    out = q.tape.new("attention output", q.shape, q.dtype, _SDPA)
    lse = q.tape.new("log-sum-exp", (BATCH, heads.query, SEQ), F32, _SDPA)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        workspace = _flash_workspace(node, heads)
        into = tuple(node.new_grad(each, source=_SDPA) for each in range(3))
        workspace.clear()
        return into

    q.tape.record("attention", (q, k, v), (q, k, v, out, lse), rule, out)
    return out


def _flash_workspace(node: Node, heads: Heads) -> list[Tensor]:
    """Temporaries that the backward kernel allocates for itself.

    Shapes:
        dq_accum                [b, s, H, d]  4 bytes
        softmax_d               [b, H, s]     4 bytes
        dk_expanded, dv_expanded  [b, s, H, d]  width of k, only with grouped heads

    Valid for: lengths that are a multiple of 128 and head widths of 32; others are rounded up.
    Source: flash-attention, mha_bwd.
    """
    full: Shape = (BATCH, SEQ, heads.query, heads.width)
    held = [
        node.scratch("dq_accum", full, F32, _FLASH, "workspace"),
        node.scratch("softmax_d", (BATCH, heads.query, SEQ), F32, _FLASH, "workspace"),
    ]
    if heads.groups > 1:
        width = node.meta_of(1)[1]
        held += [
            node.scratch(name, full, width, _FLASH, "workspace")
            for name in ("dk_expanded", "dv_expanded")
        ]
    return held


def efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: Heads, p: float = 0.0
) -> Tensor:
    """Memory-efficient attention, which SDPA takes when there is a mask or fp32 inputs.

    A boolean mask becomes a float one of the query's type, in each layer anew, and is saved.

    Shapes:
        saved: q, output      [b, s, H·d]   width of the query each
        saved: k, v           [b, s, KV·d]  width of the query each
        saved: mask           [b, 1, s, s]  width of the query
        saved: log-sum-exp    [b, H, s]     4 bytes

    Source: torch-derivatives, _scaled_dot_product_efficient_attention; torch-sdpa, attention.cu.
    """
    source = Cite("torch-derivatives", "_scaled_dot_product_efficient_attention")
    q, k, v = (ops.autocast_to_half(each) for each in (q, k, v))
    bias = None
    if mask is not None:
        bias = q.tape.new("attention mask as float", mask.shape, q.dtype, source)
    out = q.tape.new("attention output", q.shape, q.dtype, source)
    lse = q.tape.new("log-sum-exp", (BATCH, heads.query, SEQ), F32, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        delta = node.scratch("delta", (BATCH, heads.query, SEQ), F32, source, "workspace")
        into = tuple(node.new_grad(each, source=source) for each in range(3))
        del delta
        return into

    q.tape.record("attention", (q, k, v), (q, k, v, bias, out, lse), rule, out)
    return out


def math_causal(q: Tensor, k: Tensor, v: Tensor, heads: Heads, p: float = 0.0) -> Tensor:
    """SDPA's fallback in plain operators: fp32 inputs with grouped heads have no fused kernel.

    Source: torch-sdpa, attention.cpp, _scaled_dot_product_attention_math; sdp_utils.cpp admits
    grouped heads to FlashAttention only, which takes no fp32.
    """
    source = Cite("torch-sdpa", "attention.cpp, _scaled_dot_product_attention_math")
    mask = q.tape.new("causal mask as float", (SEQ, SEQ), q.dtype, source)
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    scaled, keys = ops.scale(q, "scaled query"), ops.scale(keys, "scaled keys")
    weights = ops.softmax(ops.matmul(scaled, keys, scores(heads), "scores"))
    del mask
    weights = ops.dropout(weights, p)
    return ops.matmul(weights, values, q.shape, "attention output")


def repeat_heads(x: Tensor, heads: Heads) -> Tensor:
    """Write a key or value out for every query head (transformers' repeat_kv)."""
    if heads.groups == 1:
        return x
    shape = (BATCH, heads.query, SEQ, heads.width)
    return ops.copy(x, shape, "heads repeated")


def scores(heads: Heads) -> Shape:
    """Return the shape of a full score matrix."""
    return (BATCH, heads.query, SEQ, SEQ)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: Heads,
    p: float = 0.0,
    *,
    softcap: bool = False,
    softmax_dtype: DType | None = F32,
) -> Tensor:
    """Attention in separate operators, as transformers' `eager_attention_forward` writes it.

    Args:
        softcap: Gemma 2 bends the scores with tanh.
        softmax_dtype: what the scores are cast to for the softmax; GPT-2 leaves them as they are.

    Source: hf-modeling, llama/modeling_llama.py, gemma2/modeling_gemma2.py and
    gpt2/modeling_gpt2.py, eager_attention_forward.
    """
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    weights = ops.scale(ops.matmul(q, keys, scores(heads), "scores"), "scaled scores")
    if softcap:
        weights = ops.softcapped(weights)
    if mask is not None:
        weights = ops.add(weights, mask, "masked scores")
    weights = ops.cast(ops.softmax(weights, softmax_dtype), q.dtype)
    weights = ops.dropout(weights, p)
    out = ops.matmul(weights, values, (BATCH, heads.query, SEQ, heads.width), "attention output")
    return ops.copy(out)


def heads(query: int, key_value: int, width: int) -> Heads:
    """Name the dimensions of an attention layer."""
    return Heads(dim("H", query), dim("KV", key_value), dim("d", width))
