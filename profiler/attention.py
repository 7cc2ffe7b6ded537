"""Which attention kernel CUDA's scaled-dot-product attention takes, and what it is given.

Follows torch 2.13: `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` chooses the kernel and
`aten/src/ATen/native/transformers/attention.cpp` prepares its arguments. In this version the
memory-efficient kernel takes no grouped heads (that came later, pytorch pull request 191085), so
fp32 attention with `enable_gqa=True` runs the quadratic math kernel.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

Backend = Literal["flash", "efficient", "math"]

_MAX_FLASH_HEAD_DIM: Final = 256
_SM80: Final = (8, 0)


def scaled_dot_product_attention(
    compute_capability: tuple[int, int],
    only: Backend | None,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Run `scaled_dot_product_attention` through the operators that CUDA would run."""
    import torch

    aten = torch.ops.aten
    backend = choose_backend(
        compute_capability,
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        only=only,
    )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _additive(attn_mask, query.dtype)
    if backend == "flash":
        head_dim = query.shape[-1]
        query, key, value = (_padded(tensor, 8) for tensor in (query, key, value))
        scale = head_dim**-0.5 if scale is None else scale
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out if out.shape[-1] == head_dim else out[..., :head_dim]
    if backend == "efficient":
        needs_grad = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (query, key, value)
        )
        if attn_mask is not None:
            attn_mask = _aligned_mask(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def choose_backend(
    compute_capability: tuple[int, int],
    query: Any,
    key: Any,
    value: Any,
    *,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    only: Backend | None = None,
) -> Backend:
    """Return the first kernel in CUDA's order that accepts these arguments.

    Raises:
        RuntimeError: the only kernel that is allowed does not, as torch says it.
    """
    if only == "math":
        return "math"
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        return "math"
    if any(0 in tensor.shape[1:3] for tensor in (query, key, value)):
        return "math"
    if only != "efficient" and _flash_accepts(
        compute_capability, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa
    ):
        return "flash"
    if only != "flash" and _efficient_accepts(compute_capability, query, key, value):
        return "efficient"
    if only is not None:
        raise RuntimeError("No available kernel. Aborting execution.")
    return "math"


def _flash_accepts(
    compute_capability: tuple[int, int],
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Follow `can_use_flash_attention`."""
    import torch

    head_dim = query.shape[-1]
    if attn_mask is not None or compute_capability < _SM80:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not head_dim == key.shape[-1] == value.shape[-1] <= _MAX_FLASH_HEAD_DIM:
        return False
    if is_causal and query.shape[-2] != key.shape[-2]:
        return False
    if any(tensor.stride(-1) != 1 and tensor.shape[-1] != 1 for tensor in (query, key, value)):
        return False
    consumer = (8, 6) <= compute_capability <= (8, 9) or (12, 0) <= compute_capability <= (12, 1)
    needs_grad = any(tensor.requires_grad for tensor in (query, key, value))
    if consumer and needs_grad and not (head_dim <= 192 or (head_dim > 224 and not dropout_p)):
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    if enable_gqa:
        return bool(kv_heads == value.shape[1] and heads % kv_heads == 0)
    return bool(heads == kv_heads == value.shape[1])


def _efficient_accepts(
    compute_capability: tuple[int, int], query: Any, key: Any, value: Any
) -> bool:
    """Follow `can_use_mem_efficient_attention`."""
    import torch

    if query.dtype == torch.bfloat16 and compute_capability < _SM80:
        return False
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return False
    if not query.shape[1] == key.shape[1] == value.shape[1]:
        return False
    alignment = _gemm_alignment(compute_capability, query.dtype.itemsize)
    width, value_width = int(query.shape[-1]), int(value.shape[-1])
    aligned = width % alignment == 0 and value_width % alignment == 0
    return aligned and width == int(key.shape[-1])


def _gemm_alignment(compute_capability: tuple[int, int], element_bytes: int) -> int:
    """Follow `minimum_gemm_alignment`: elements to which the head width must be aligned."""
    tensor_cores = compute_capability >= _SM80 or (
        compute_capability >= (7, 0) and element_bytes == 2
    )
    alignment = 4 if compute_capability >= _SM80 else 1
    return max(alignment, 16 // element_bytes) if tensor_cores else alignment


def _math(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """Follow `_scaled_dot_product_attention_math`, which computes in fp32.

    Written out here because the C++ function adds the mask out of place under a dispatch mode.
    """
    import torch

    aten, dtype = torch.ops.aten, query.dtype
    scaling = math.sqrt(query.shape[-1] ** -0.5 if scale is None else scale)
    query, key, value = query.float(), key.float(), value.float()
    query = aten.mul.Scalar(query, scaling)
    if is_causal:
        lower = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        attn_mask = _additive(lower, query.dtype)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    scores = torch.matmul(query, aten.mul.Scalar(key.transpose(-2, -1), scaling))
    if attn_mask is not None:
        scores.add_(attn_mask)
    probabilities = aten._safe_softmax(scores, -1)
    del scores
    if dropout_p > 0.0:
        probabilities = aten.dropout(probabilities, dropout_p, True)
    # The second result of the C++ function, which lives until it returns.
    weights = probabilities.to(dtype)
    out = torch.matmul(probabilities, value).to(dtype)
    del weights
    return out


def _additive(mask: Any, dtype: Any) -> Any:
    """Follow `convert_boolean_attn_mask`: 0 where attended, -inf elsewhere, in query's dtype."""
    import torch

    return torch.where(mask, 0.0, torch.scalar_tensor(float("-inf"), dtype=dtype))


def _padded(tensor: Any, alignment: int) -> Any:
    """Follow `pad_last_dim`: zeros behind the last dimension up to a multiple of `alignment`."""
    import torch

    rest = tensor.shape[-1] % alignment
    return torch.nn.functional.pad(tensor, (0, alignment - rest)) if rest else tensor


def _aligned_mask(mask: Any, query: Any, key: Any) -> Any:
    """Follow `preprocess_mask`: padded and sliced back where rows are not aligned to 8 elements."""
    import torch

    if mask.stride(-1) != 1 or any(stride % 8 for stride in mask.stride()[:-1]):
        width = mask.shape[-1]
        mask = torch.nn.functional.pad(mask, (0, 8 - width % 8))[..., :width]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
