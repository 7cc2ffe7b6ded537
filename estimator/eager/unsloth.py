"""Operators of Unsloth's kernels of 2026, where they differ from those that FOAK took over."""

from __future__ import annotations

from typing import Any, Final

from estimator.eager.ops import Grads, Out
from estimator.eager.tensor import Node, Tensor
from estimator.sources import Cite

NORM: Final = Cite("unsloth", "kernels/rms_layernorm.py, Fast_RMS_Layernorm, reuse_grad")
_ROPE: Final = Cite("unsloth", "kernels/rope_embedding.py, Fast_RoPE_Embedding_QK_Positions")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions written over queries and keys; backward writes new gradients.

    Shapes:
        saved: cos, sin      [1, s, d]  the tables of all layers
        backward: gradients  [b, s, H, d] and [b, s, KV, d]

    Source: unsloth, kernels/rope_embedding.py, Fast_RoPE_Embedding_QK_Positions.
    """
    outs = tuple(
        Tensor(each.tape, each.shape, each.dtype, each.storage, base=each.base or each)
        for each in (q, k)
    )

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return tuple(node.new_grad(number, source=_ROPE) for number in range(len(grads)))

    q.tape.record("rope", (q, k), (cos, sin), rule, *outs)
    return outs[0], outs[1]
