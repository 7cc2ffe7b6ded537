"""What stands for compiled flex attention, whose Triton kernels need a GPU.

The buffers are those of torch 2.13's templates, torch/_inductor/kernel/flex/flex_attention.py. The
block mask is left out: one number for each block of 128 x 128 scores, in a few index tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask


def block_mask(*_: Any, **__: Any) -> BlockMask:
    """Return a block mask without contents, in place of `create_block_mask`."""
    return BlockMask.__new__(BlockMask)


def compiled(query: Any, key: Any, value: Any, training: bool = False, **_: Any) -> torch.Tensor:
    """Attend as `torch.compile(flex_attention)` does."""
    out: torch.Tensor = _Flex.apply(query, key, value)
    return out


class _Flex(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """What the two templates allocate, and what the partitioner saves between them."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Follow flex_attention: the output is laid out as the query; maxima die at once."""
        out = torch.empty_like(query)
        rows = query.shape[:-1]
        logsumexp = query.new_empty(rows, dtype=torch.float32)
        query.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Follow flex_attention_backward: delta, and gradients in the type of the inputs."""
        query, key, value, _out, logsumexp = ctx.saved_tensors
        delta = torch.empty_like(logsumexp)
        gradients = tuple(torch.empty_like(each) for each in (query, key, value))
        del delta
        return gradients
