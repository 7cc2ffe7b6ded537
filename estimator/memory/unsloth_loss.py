"""Unsloth's loss on hidden states, whose chunks torch.compile has compiled."""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.tensor import Node, Tensor, reshaped, view
from estimator.memory.fused_loss import TOKENS, FusedLoss, chunk_of, head_weight, rounds
from estimator.model.forward import Forward
from estimator.model.spec import ModelSpec
from estimator.sources import Assumption, Cite
from estimator.units import ceil_div

_LOSS: Final = Cite("unsloth", "unsloth_zoo fused_losses/cross_entropy_loss.py, UnslothFusedLoss")
_CHUNK: Final = Assumption(
    "what inductor of torch 2.13 makes of one chunk: logits, their gradient, four numbers a token "
    "(unsloth: unsloth_zoo fused_losses/cross_entropy_loss.py, accumulate_chunk)"
)
# Bytes for one logit and the most that all chunks but the gradient may take; `get_chunk_size`.
BYTES_PER_LOGIT: Final = 16
BUDGET: Final = 4 * 2**30


class UnslothLoss(FusedLoss, frozen=True):
    """The gradient of the hidden states is made in forward, chunk by chunk.

    Shapes:
        gradient of the hidden states  [b, s, h]  saved; multiplied in backward, into a new one
        logits of a chunk              [c, V]     width of the hidden states
        gradient of those logits       [c, V]     beside them for one kernel
        gradient of a chunk            [c, h]

    The number of chunks is a multiple of 4, or 1: 16 bytes for a logit have to fit into 4 GiB less
    the gradient of the hidden states, where more than 8 GiB of the GPU are free.

    Source: unsloth, unsloth_zoo fused_losses/cross_entropy_loss.py, get_chunk_size.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> int | None:
        fixed = 2 * tokens * spec.hidden.value
        budget = BUDGET - fixed if fixed < BUDGET else BUDGET
        needed = BYTES_PER_LOGIT * tokens * spec.vocab.value
        if needed <= budget:
            return None
        return ceil_div(tokens, min(4 * ceil_div(needed, 4 * budget), tokens))

    def __call__(self, forward: Forward, hidden: Tensor, labels: Tensor) -> Tensor:
        tape, vocab, half = hidden.tape, forward.spec.vocab, hidden.dtype
        weight = head_weight(forward)
        shifted = tape.new("labels shifted", TOKENS, DType.INT64, _LOSS)
        counted = tape.new("labels that count", TOKENS, DType.BOOL, _LOSS)
        del counted
        gradient = tape.new("gradient of the hidden states", hidden.shape, half, _LOSS)
        loss = tape.new("loss", (), F32, _LOSS)
        rows = chunk_of(tape)
        for _ in range(rounds(tape)):
            logits = [tape.new("logits of a chunk", (*rows, vocab), half, _CHUNK)]
            logits += [tape.new("number of a token", rows, F32, _CHUNK) for _ in range(4)]
            logits.pop()
            logits.append(tape.new("number of a token", rows, F32, _CHUNK))
            into = tape.new("gradient of the logits", (*rows, vocab), half, _CHUNK)
            logits.clear()
            made = tape.new("gradient of a chunk", (*rows, forward.spec.hidden), half, _CHUNK)
            del into, made
        del shifted

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            into = node.new_grad(0, source=_LOSS)
            return reshaped(into, into.shape), None

        tape.record("unsloth loss", (view(hidden, hidden.shape), weight), (gradient,), rule, loss)
        return loss
