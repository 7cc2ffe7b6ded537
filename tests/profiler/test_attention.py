"""CUDA's choice of attention kernel, and what autocast does there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from profiler.attention import Backend, choose_backend
from profiler.cuda_semantics import (
    AUTOCAST_FP32,
    AUTOCAST_FP32_SET_OPT_DTYPE,
    AUTOCAST_LOWER,
    AUTOCAST_PROMOTE,
    cuda_semantics,
)

A100, RTX_4090, T4 = (8, 0), (8, 9), (7, 5)


def _heads(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(2, count, 16, width, dtype=dtype, device="meta", requires_grad=True)


# The filters of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp at torch 2.13, one row each.
@pytest.mark.parametrize(
    ("gpu", "dtype", "width", "kv_heads", "masked", "dropout", "backend"),
    [
        (A100, torch.bfloat16, 64, 8, False, 0.0, "flash"),
        (A100, torch.bfloat16, 64, 2, False, 0.1, "flash"),
        (A100, torch.bfloat16, 256, 8, False, 0.0, "flash"),
        (A100, torch.bfloat16, 320, 8, False, 0.0, "efficient"),
        (A100, torch.bfloat16, 64, 8, True, 0.0, "efficient"),
        (A100, torch.bfloat16, 64, 2, True, 0.0, "math"),
        (A100, torch.float32, 64, 8, False, 0.0, "efficient"),
        (A100, torch.float32, 64, 2, False, 0.0, "math"),
        (A100, torch.float64, 64, 8, False, 0.0, "math"),
        (A100, torch.bfloat16, 12, 8, True, 0.0, "math"),
        (RTX_4090, torch.bfloat16, 256, 8, False, 0.0, "flash"),
        (RTX_4090, torch.bfloat16, 256, 8, False, 0.1, "efficient"),
        (T4, torch.float16, 64, 8, False, 0.0, "efficient"),
        (T4, torch.bfloat16, 64, 8, False, 0.0, "math"),
    ],
)
def test_the_first_kernel_that_accepts_the_arguments_is_taken(
    gpu: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    kv_heads: int,
    masked: bool,
    dropout: float,
    backend: Backend,
) -> None:
    chosen = choose_backend(
        gpu,
        _heads(8, width, dtype),
        _heads(kv_heads, width, dtype),
        _heads(kv_heads, width, dtype),
        attn_mask=torch.empty(2, 1, 16, 16, device="meta") if masked else None,
        dropout_p=dropout,
        is_causal=not masked,
        enable_gqa=kv_heads != 8,
    )
    assert chosen == backend


@pytest.mark.parametrize(("masked", "kv_heads"), [(False, 8), (False, 2), (True, 8)])
def test_the_math_kernel_computes_what_torch_computes(masked: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 8, 5, 12, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, 5, 12, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, 5, 5) > 0.3 if masked else None
    arguments = {"attn_mask": mask, "is_causal": not masked, "enable_gqa": kv_heads != 8}
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query, key, value, **arguments)
    with cuda_semantics(A100):
        found = attend(query, key, value, **arguments)
    # On CUDA the math kernel computes in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_torch_is_itself_again_afterwards() -> None:
    tensor = torch.ones(4, 4, requires_grad=True)
    with cuda_semantics(A100):
        assert "NativeDropout" in type(torch.dropout(tensor, 0.5, True).grad_fn).__name__
    assert "Mul" in type(torch.dropout(tensor, 0.5, True).grad_fn).__name__


def _header_list(macro: str) -> set[str]:
    """Return the operators of one list in torch's own header, without overloads."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*\n)", header.read_text())
    assert body is not None
    return set(re.findall(r"_\((\w+)", body[1]))


@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("AT_FORALL_FP32", AUTOCAST_FP32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", AUTOCAST_FP32_SET_OPT_DTYPE),
        ("AT_FORALL_PROMOTE", AUTOCAST_PROMOTE),
        ("AT_FORALL_LOWER_PRECISION_FP", AUTOCAST_LOWER),
    ],
)
def test_autocast_lists_are_parts_of_torchs_own(macro: str, ours: tuple[str, ...]) -> None:
    assert {name.partition(".")[0] for name in ours} <= _header_list(macro)


@pytest.mark.parametrize("name", ["exp", "rsqrt", "logsumexp", "cumsum", "sum", "softmax"])
def test_autocast_computes_in_fp32_what_cuda_computes_in_fp32(name: str) -> None:
    tensor = torch.ones(4, 4, dtype=torch.bfloat16)
    needs_dim = name in ("logsumexp", "cumsum", "softmax")
    with cuda_semantics(A100), torch.autocast("cpu", torch.bfloat16):
        result = getattr(tensor, name)(*((0,) if needs_dim else ()))
        product = tensor @ tensor.float()
    assert (result.dtype, product.dtype) == (torch.float32, torch.bfloat16)
