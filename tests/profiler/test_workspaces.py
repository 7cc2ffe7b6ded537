"""Memory that kernels take inside themselves."""

from __future__ import annotations

from typing import Any

import pytest

from profiler.quantizations import bnb_4bit
from profiler.trace import Storage
from tests.profiler.recipes import TINY, traced

NARROW = {**TINY, "num_hidden_layers": 1}


def _named(operator: str, seq_len: int = 64, **fields: Any) -> list[Storage]:
    step = traced(NARROW, seq_len=seq_len, **fields)
    return [storage for storage in step.storages if storage.operator == operator]


def test_an_embedding_of_more_than_3072_tokens_sorts_them_and_sums_in_fp32() -> None:
    # aten/src/ATen/native/cuda/Embedding.cu: up to 3072 indices take the kernel without buffers.
    assert _named("grad_weight_per_segment", seq_len=3072) == []
    sums = _named("grad_weight_per_segment", seq_len=3073)
    assert [storage.bytes for storage in sums] == [4 * 3073 * 64] * 2


@pytest.mark.parametrize(("gpu", "size"), [("a100-80gb", 8_519_680), ("h100-sxm", 33_554_432)])
def test_each_thread_holds_one_cublas_workspace(gpu: str, size: int) -> None:
    # 8,519,680 is what pytorch issue 95668 shows left over on an A10G.
    step = traced(NARROW, hardware=gpu)
    handles = [storage.bytes for storage in step.storages if "cuBLAS" in storage.operator]
    assert handles == [size, size]


def test_grouped_heads_are_expanded_in_flash_attentions_backward() -> None:
    # flash_api.cpp, mha_bwd: dk and dv get one head for each query head before they are summed.
    expanded = _named("dk_expanded") + _named("dv_expanded")
    assert {storage.bytes for storage in expanded} == {2 * 64 * 4 * 16}
    accumulator = _named("dq_accum")
    assert {storage.bytes for storage in accumulator} == {4 * 128 * 4 * 32}


@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "fused"),
    [(4, 4096, 4096, True), (2048, 4096, 4096, False), (512, 4096, 4096, False)],
)
def test_4_bit_products_of_many_tokens_unpack_the_weight_first(
    tokens: int, out_features: int, in_features: int, fused: bool
) -> None:
    # bitsandbytes/backends/cuda/ops.py: the floor is 4 tokens; sm80 loses to the unpacked product
    # from a few dozen tokens on, and every GPU does above 1536.
    import torch

    asked = ((8, 0), 108, torch.bfloat16, tokens, out_features, in_features)
    assert bnb_4bit.is_fused(*asked) is fused


def test_unpacked_weights_are_counted_in_forward_and_backward() -> None:
    config = {**NARROW, "hidden_size": 256}
    step = traced(config, method="qlora", seq_len=2048, autocast="bf16")
    steady = {event.storage for event in step.events[step.steady_from :]}
    unpacked = {
        (storage.phase, storage.operator)
        for index, storage in enumerate(step.storages)
        if index in steady and storage.bytes == 2 * 256 * 256 and "_proj" in storage.module
    }
    assert ("forward", "unpacked weight") in unpacked
    assert ("backward", "bitsandbytes.dequantize_4bit") in unpacked
