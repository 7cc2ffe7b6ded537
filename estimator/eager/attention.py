"""Scaled dot product attention: the kernels that CUDA takes, what they save, their workspaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, ONE, SECOND, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor
from estimator.sources import Cite
from estimator.units import round_up

_SDPA: Final = Cite("torch-derivatives", "_scaled_dot_product_flash_attention")
_FLASH: Final = Cite("flash-attention", "mha_bwd")
_FLASH_3_WIDTHS: Final = (64, 96, 128, 192, 256)
MASK: Final[Shape] = (BATCH, ONE, SEQ, SEQ)
PREFIXED_MASK: Final[Shape] = (BATCH, ONE, SEQ, SECOND)


class Heads(Struct, frozen=True, eq=False):
    """Head counts and widths of one attention layer."""

    query: Dim
    key_value: Dim
    width: Dim

    @property
    def groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.query.value // self.key_value.value


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    buffers: Callable[[Node, Heads], list[Tensor]] | None = None,
) -> Tensor:
    """FlashAttention 2, as SDPA or as its own package: no score matrix is ever kept.

    The output lies in memory as the query does.

    Shapes:
        saved: q, output     [b, s, H·d]   2 bytes each
        saved: k, v          [b, s, KV·d]  2 bytes each
        saved: log-sum-exp   [b, H, s]     4 bytes

    Source: torch-derivatives, _scaled_dot_product_flash_attention.
    """
    v, k, q = (ops.autocast_to_half(each) for each in (v, k, q))
    out = _fused_result("attention output", q, q.shape, q.dtype, _SDPA)
    lse = _fused_result("log-sum-exp", q, (BATCH, heads.query, SEQ), F32, _SDPA)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return _gradients(node, _SDPA, lambda: (buffers or _flash_workspace)(node, heads))

    q.tape.record("attention", (q, k, v), (q, k, v, out, lse), rule, out)
    return out


def _fused_result(name: str, q: Tensor, shape: Shape, dtype: DType, source: Cite) -> Tensor:
    """One result of a fused kernel; a region that keeps such results has it already."""
    out = Tensor(q.tape, shape, dtype, None)
    q.tape.result("attention", out, name, source)
    return out


def flash_3(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """FlashAttention 3 for Hopper: it saves what version 2 saves, and works in other buffers.

    Source: flash-attention-3, flash_attn_interface.py, setup_context; flash_api.cpp, mha_bwd.
    """
    return flash(q, k, v, heads, _flash_3_workspace)


def flex(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """Flex attention, compiled by inductor: masks are code, and no gradient is summed in fp32.

    transformers repeats keys and values where the query heads are no power of two. The block mask
    is left out: a few numbers for each block of 128 x 128 scores.

    Shapes:
        saved: q, output     [b, s, H·d]   width of the query each
        saved: k, v          [b, s, KV·d]  width of the query each
        saved: log-sum-exp   [b, H, s]     4 bytes

    Source: torch-flex, _inductor/kernel/flex/flex_attention.py, flex_attention and
    flex_attention_backward; hf-library, integrations/flex_attention.py, flex_attention_forward.
    """
    source = Cite("torch-flex", "_inductor/kernel/flex/flex_attention.py, flex_attention")
    if heads.query.value & (heads.query.value - 1):
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    rows: Shape = (BATCH, heads.query, SEQ)
    out = _fused_result("attention output", q, q.shape, q.dtype, source)
    lse = _fused_result("log-sum-exp", q, rows, F32, source)
    q.tape.new("maximal scores", rows, F32, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        workspace = [node.scratch("delta", rows, F32, source, "workspace")]
        into = _gradients(node, source)
        workspace.clear()
        return into

    q.tape.record("attention", (q, k, v), (q, k, v, out, lse), rule, out)
    return out


def flash_unpadded(
    q: Tensor, k: Tensor, v: Tensor, heads: Heads, kernel: Callable[..., Tensor] = flash
) -> Tensor:
    """FlashAttention over a padded batch: the tokens are picked out and put back around it.

    Every position is counted as a token, so the copies are an upper bound.

    Source: hf-library, modeling_flash_attention_utils.py, _upad_input and _pad_input.
    """
    keys, values = ops.pick(k, k.shape), ops.pick(v, v.shape)
    queries = ops.pick(q, q.shape)
    return ops.scatter(kernel(queries, keys, values, heads))


def _gradients(
    node: Node, source: Cite, workspace: Callable[[], list[Tensor]] | None = None
) -> Out:
    """The gradients of query, key and value: the kernel makes all three, wanted or not.

    Args:
        workspace: what it makes for itself, when they are there.
    """
    made = [
        node.new_grad(each, source=source)
        if node.wants(each)
        else node.scratch("unwanted gradient", *node.meta_of(each), source)
        for each in range(3)
    ]
    held = workspace() if workspace is not None else []
    held.clear()
    return tuple(grad if node.wants(each) else None for each, grad in enumerate(made))


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
        shape, width = node.meta_of(1)
        expanded = (BATCH, keys_of(shape), heads.query, heads.width)
        held += [
            node.scratch(name, expanded, width, _FLASH, "workspace")
            for name in ("dk_expanded", "dv_expanded")
        ]
    return held


def _flash_3_workspace(node: Node, heads: Heads) -> list[Tensor]:
    """Temporaries that the backward of FlashAttention 3 allocates for itself.

    Shapes:
        dq_accum                     [b, H, s, d']   4 bytes; d' is 64, 96, 128, 192 or 256
        softmax_d, softmax_lse_log2  [b, H, s]       4 bytes each
        dk_accum, dv_accum           [b, KV, s, d']  4 bytes each, only with grouped heads

    Valid for: lengths that are a multiple of the kernel's blocks, 64 to 128; others are rounded up.
    Source: flash-attention-3, flash_api.cpp, mha_bwd.
    """
    source = Cite("flash-attention-3", "flash_api.cpp, mha_bwd")
    width = dim("d'", min(each for each in _FLASH_3_WIDTHS if each >= heads.width.value))
    rows: Shape = (BATCH, heads.query, SEQ)
    held = [
        node.scratch("softmax_d", rows, F32, source, "workspace"),
        node.scratch("softmax_lse_log2", rows, F32, source, "workspace"),
        node.scratch("dq_accum", (*rows, width), F32, source, "workspace"),
    ]
    if heads.groups > 1:
        shape: Shape = (BATCH, heads.key_value, SEQ, width)
        held += [
            node.scratch(name, shape, F32, source, "workspace") for name in ("dk_accum", "dv_accum")
        ]
    return held


def math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: Heads, p: float = 0.0
) -> Tensor:
    """SDPA in plain operators, where the training script allows no other kernel.

    Half precision inputs are raised to fp32, and autocast is off inside.

    Shapes:
        saved: scaled q            [b, s, H, d]  4 bytes
        saved: keys, values        [b, H, s, d]  4 bytes each
        saved: attention weights   [b, H, s, s]  4 bytes

    Source: torch-sdpa, attention.cpp, _scaled_dot_product_attention_math.
    """
    source = Cite("torch-sdpa", "attention.cpp, _scaled_dot_product_attention_math")
    tape = q.tape
    v, k, q = (ops.autocast_to_half(each) for each in (v, k, q))
    enabled, tape.autocast_enabled = tape.autocast_enabled, False
    bias = None if mask is None else additive(mask, q.dtype)
    query, keys, values = (ops.cast(each, F32) for each in (q, k, v))
    query = ops.scale(query, "scaled query")
    if bias is None:
        lower = tape.new("causal mask", (SEQ, SEQ), DType.BOOL, source)
        bias = additive(lower, F32)
    if keys.shape[2] is heads.key_value:
        keys, values = repeat_heads(keys, heads), repeat_heads(values, heads)
    product = ops.matmul(query, ops.scale(keys, "scaled keys"), scores(heads), "scores")
    product = ops.add_in_place(product, bias)
    weights = _safe_softmax(product)
    del product
    weights = ops.dropout(weights, p)
    returned = ops.cast(weights, q.dtype, "attention weights that nobody reads")
    out = ops.matmul(weights, values, (BATCH, heads.query, SEQ, heads.width), "attention output")
    out = ops.cast(out, q.dtype)
    del returned
    tape.autocast_enabled = enabled
    return out


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: Heads,
    p: float = 0.0,
) -> Tensor:
    """Memory-efficient attention, which SDPA takes when there is a mask or fp32 inputs.

    The mask is saved; one of another type than the query is written out in each layer anew.

    Shapes:
        saved: q, output      [b, s, H·d]   width of the query each
        saved: k, v           [b, s, KV·d]  width of the query each
        saved: mask           [b, 1, s, s]  width of the query
        saved: log-sum-exp    [b, H, s]     4 bytes

    Source: torch-derivatives, _scaled_dot_product_efficient_attention; torch-sdpa,
    cuda/attention.cu.
    """
    source = Cite("torch-derivatives", "_scaled_dot_product_efficient_attention")
    v, k, q = (ops.autocast_to_half(each) for each in (v, k, q))
    bias = None if mask is None else additive(mask, q.dtype)
    shape = (BATCH, SEQ, heads.query, heads.width)
    out = _fused_result("attention output", q, shape, q.dtype, source)
    lse = _fused_result("log-sum-exp", q, (BATCH, heads.query, SEQ), F32, source)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return _gradients(node, source, lambda: efficient_workspace(node, heads))

    q.tape.record("attention", (q, k, v), (q, k, v, bias, out, lse), rule, out)
    return out


def efficient_workspace(node: Node, heads: Heads) -> list[Tensor]:
    """Temporaries that the backward kernel allocates beside its gradients.

    Shapes:
        delta           [b, H, s]       4 bytes
        dq accumulator  [b, H, s, d64]  4 bytes; d64 is the head width rounded up to 64

    Valid for: lengths that are a multiple of 128; others are rounded up.
    Source: torch-sdpa, cuda/attention_backward.cu, _efficient_attention_backward;
    cuda/mem_eff_attention/kernel_backward.h, workspace_elements_gq.
    """
    source = Cite("torch-sdpa", "cuda/mem_eff_attention/kernel_backward.h, workspace_size")
    columns = dim("d64", round_up(heads.width.value, 64))
    return [
        node.scratch("delta", (BATCH, heads.query, SEQ), F32, source, "workspace"),
        node.scratch(
            "dq accumulator", (BATCH, heads.query, SEQ, columns), F32, source, "workspace"
        ),
    ]


def math_causal(q: Tensor, k: Tensor, v: Tensor, heads: Heads, p: float = 0.0) -> Tensor:
    """SDPA's fallback in plain operators: fp32 inputs with grouped heads have no fused kernel.

    Source: torch-sdpa, attention.cpp, _scaled_dot_product_attention_math; cuda/sdp_utils.cpp admits
    grouped heads to FlashAttention only, which takes no fp32.
    """
    source = Cite("torch-sdpa", "attention.cpp, _scaled_dot_product_attention_math")
    scaled = ops.scale(q, "scaled query")
    ones = q.tape.new("ones", (SEQ, SEQ), DType.BOOL, source)
    lower = q.tape.new("causal mask", (SEQ, SEQ), DType.BOOL, source)
    del ones
    mask = additive(lower, q.dtype)
    del lower
    # Mask and repeated keys have names there that live until the end.
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    product = ops.matmul(scaled, ops.scale(keys, "scaled keys"), scores(heads), "scores")
    weights = _safe_softmax(product)
    del product
    weights = ops.dropout(weights, p)
    shape = (BATCH, heads.query, SEQ, heads.width)
    out = ops.matmul(weights, values, shape, "attention output")
    del mask, keys
    return out


def additive(mask: Tensor, dtype: DType) -> Tensor:
    """Return a mask in the type of the query: written out, unless it has that type already.

    Source: torch-sdpa, attention.cpp, convert_boolean_attn_mask; autocast casts a float mask.
    """
    if mask.dtype is dtype:
        return mask
    source = Cite("torch-sdpa", "attention.cpp, convert_boolean_attn_mask")
    return mask.tape.new("attention mask as float", mask.shape, dtype, source)


def math_broadcast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: Heads) -> Tensor:
    """SDPA's fallback in plain operators, with one key head that is broadcast to all query heads.

    Without `enable_gqa` no fused kernel takes fewer key heads than query heads. Half precision
    inputs are raised to fp32, autocast is off inside, and every name lives until the end.

    Shapes:
        saved: scaled q, k, v     [b, H, s, d]  4 bytes each; with a single row k and v have 1 head
        saved: attention weights  [b, H, s, s]  4 bytes

    Source: torch-sdpa, attention.cpp, _scaled_dot_product_attention_math and _safe_softmax.
    """
    tape = q.tape
    v, k, q = (ops.autocast_to_half(each) for each in (v, k, q))
    enabled, tape.autocast_enabled = tape.autocast_enabled, False
    bias = additive(mask, q.dtype)
    query_acc, key_acc, value_acc = (ops.cast(each, F32) for each in (q, k, v))
    query = ops.scale(query_acc, "scaled query")
    keys = every_head(ops.scale(key_acc, "scaled keys"), heads)
    weights = ops.matmul(query, keys, scores(heads, keys_of(k.shape)), "scores")
    del keys
    weights = ops.add_in_place(weights, bias)
    weights = _safe_softmax(weights)
    returned = ops.cast(weights, q.dtype, "attention weights that nobody reads")
    shape = (BATCH, heads.query, SEQ, heads.width)
    out = ops.matmul(weights, every_head(value_acc, heads), shape, "attention output")
    out = ops.cast(out, q.dtype)
    del returned
    tape.autocast_enabled = enabled
    return out


def _safe_softmax(x: Tensor) -> Tensor:
    """Softmax that then looks for rows without any key, one byte for each element."""
    out = ops.softmax(x)
    source = Cite("torch-sdpa", "attention.cpp, _safe_softmax")
    x.tape.new("elements that are masked", x.shape, DType.BOOL, source)
    return out


def every_head(x: Tensor, heads: Heads) -> Tensor:
    """Broadcast the one key or value head as torch.matmul does: written out for several rows."""
    if x.tape.regime.several_rows:
        shape = (BATCH, heads.query, keys_of(x.shape), heads.width)
        return ops.copy(x, shape, "broadcast to every head")
    return ops.expand(x, (BATCH, keys_of(x.shape), heads.query, heads.width))


def repeat_heads(x: Tensor, heads: Heads) -> Tensor:
    """Write a key or value out for every query head (transformers' repeat_kv)."""
    if heads.groups == 1:
        return x
    shape = (BATCH, heads.query, keys_of(x.shape), heads.width)
    return ops.copy(x, shape, "heads repeated")


def scores(heads: Heads, keys: Dim = SEQ) -> Shape:
    """Return the shape of a full score matrix."""
    return (BATCH, heads.query, SEQ, keys)


def keys_of(shape: Shape) -> Dim:
    """Return the length of keys: the second one where a prefix lies before them."""
    return SECOND if SECOND in shape else SEQ


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
) -> tuple[Tensor, Tensor]:
    """Attention in separate operators, as transformers' `eager_attention_forward` writes it.

    Args:
        softcap: Gemma 2 bends the scores with tanh.
        softmax_dtype: what the scores are cast to for the softmax; GPT-2 leaves them as they are.

    Returns:
        The output, and the attention weights: a name in the layer's forward keeps these alive.

    Source: hf-modeling, llama/modeling_llama.py, gemma2/modeling_gemma2.py and
    gpt2/modeling_gpt2.py, eager_attention_forward.
    """
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    full = scores(heads, keys_of(k.shape))
    weights = ops.scale(ops.matmul(q, keys, full, "scores"), "scaled scores")
    if softcap:
        weights = ops.scale(weights, "scores over the cap")
        weights = ops.tanh(weights)
        weights = ops.scale(weights, "capped scores")
    if mask is not None:
        weights = ops.add(weights, mask, "masked scores")
    weights = ops.cast(ops.softmax(weights, softmax_dtype), q.dtype)
    weights = ops.dropout(weights, p)
    shape = (BATCH, heads.query, SEQ, heads.width)
    return ops.matmul(weights, values, shape, "attention output"), weights


def heads(query: int, key_value: int, width: int) -> Heads:
    """Name the dimensions of an attention layer."""
    return Heads(dim("H", query), dim("KV", key_value), dim("d", width))
