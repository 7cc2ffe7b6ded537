"""TRL's head: log-probabilities tile by tile, the gradients accumulated in fp32."""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import Shape, dim
from estimator.eager.tensor import Node, Param, Tape, Tensor
from estimator.memory.fused_loss import TOKENS, FusedLoss, chunk_of, head_weight, rounds
from estimator.model.forward import Forward
from estimator.model.spec import ModelSpec
from estimator.sources import Cite

_FORWARD: Final = Cite("trl", "kernels/chunked_logprob.py, ChunkedLogProbFunction.forward")
_BACKWARD: Final = Cite("trl", "kernels/chunked_logprob.py, ChunkedLogProbFunction.backward")
_HEAD: Final = Cite("trl", "trainer/utils.py, add_fused_lm_head")
_TOKEN_CHUNK: Final = 4096
_VOCAB_CHUNK: Final = 32_768
_STATISTICS: Final = 7


class ChunkedHead(FusedLoss, frozen=True):
    """TRL's fused head: backward computes each tile of logits again.

    Shapes:
        tile of logits, in both passes   [min(b·s, 4096), 32768]  width of the products
        saved: hidden states that count  [b, s, h]  width of the hidden states
        backward: gradients              [b, s, h] and [V, h]  4 bytes each
        backward: the same, cast         [b, s, h] and [V, h]  width of hidden states and weight

    Every position is counted, really the last of each row is not; chunks are counted as whole.

    Source: trl, kernels/chunked_logprob.py, ChunkedLogProbFunction; trainer/utils.py,
    add_fused_lm_head.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> int | None:
        return _TOKEN_CHUNK if tokens > _TOKEN_CHUNK else None

    def __call__(self, forward: Forward, hidden: Tensor, labels: Tensor) -> Tensor:
        tape, weight = hidden.tape, head_weight(forward)
        counted = tape.new("labels that count", TOKENS, DType.BOOL, _HEAD)
        given = ops.pick(ops.part(hidden, hidden.shape), hidden.shape)
        targets = tape.new("labels picked", TOKENS, DType.INT64, _HEAD)
        log_probs, entropy, hits = _log_probs(given, weight, targets)
        log_probs = ops.scatter(log_probs)
        entropy, hits = ops.scatter(entropy), ops.scatter(hits)
        loss = _mean(ops.neg(log_probs))
        del counted, log_probs, entropy, hits
        return loss


def _log_probs(given: Tensor, weight: Param, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tape = given.tape
    width = tape.autocast if tape.autocast_enabled and tape.autocast else given.dtype
    statistics = [
        tape.new("statistics of each token", TOKENS, F32, _FORWARD) for _ in range(_STATISTICS)
    ]
    tile = tape.new("tile of logits", _tile(tape), width, _FORWARD)
    chunk = None
    for _ in range(rounds(tape)):
        if given.dtype is not width:
            shape = (*chunk_of(tape), *given.shape[2:])
            chunk = tape.new("hidden states of a chunk, cast", shape, width, _FORWARD)
        if weight.dtype is not width:
            tape.new("rows of the weight, cast", _row_chunks(weight.shape)[0], width, _FORWARD)
    log_z = tape.new("log-sum-exp", TOKENS, F32, _FORWARD)
    out = tape.new("log-probabilities", TOKENS, F32, _FORWARD)
    entropy = tape.new("entropy", TOKENS, F32, _FORWARD)
    hits = tape.new("hits", TOKENS, DType.BOOL, _FORWARD)
    del statistics, tile, chunk

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return _backward(node, width)

    saved = (given, weight, targets, log_z, entropy)
    tape.record("chunked", (given, weight), saved, rule, out, entropy)
    return out, entropy, hits


def _backward(node: Node, width: DType) -> Out:
    """Accumulate both gradients in fp32, and cast them when every tile has been seen."""
    hidden, weight = node.meta_of(0), node.meta_of(1)
    into_hidden = node.new_grad(0, dtype=F32, source=_BACKWARD) if node.wants(0) else None
    into_weight = node.new_grad(1, dtype=F32, source=_BACKWARD) if node.wants(1) else None
    tile = node.scratch("tile of logits", _tile(node.tape), width, _BACKWARD)
    states = rows = None
    accumulated: list[Tensor] = []
    for _ in range(rounds(node.tape)):
        if hidden[1] is not width:
            shape = (*chunk_of(node.tape), *hidden[0][2:])
            states = node.scratch("hidden states of a chunk, cast", shape, width, _BACKWARD)
        if weight[1] is not width:
            for each in _row_chunks(weight[0]):
                # The name still holds the chunk before this one.
                rows = node.scratch("rows of the weight, cast", each, width, _BACKWARD)
    if into_hidden is not None and hidden[1] is not F32:
        accumulated.append(into_hidden)
        into_hidden = node.new_grad(0, source=_BACKWARD)
    if into_weight is not None and weight[1] is not F32:
        accumulated.append(into_weight)
        into_weight = node.new_grad(1, source=_BACKWARD)
    accumulated.clear()
    del tile, states, rows
    return into_hidden, into_weight


def _tile(tape: Tape) -> Shape:
    return (*chunk_of(tape), dim("vocabulary chunk", _VOCAB_CHUNK))


def _row_chunks(shape: Shape) -> list[Shape]:
    """Return the shapes of the chunks of a weight; of the full ones two are enough."""
    full, rest = divmod(shape[0].value, _VOCAB_CHUNK)
    widths = [_VOCAB_CHUNK] * min(full, 2) + ([rest] if rest else [])
    return [(dim("vocabulary chunk", each), *shape[1:]) for each in widths]


def _mean(losses: Tensor) -> Tensor:
    """Sum what the tokens lose and divide by their number; backward broadcasts one number."""
    loss = losses.tape.new("loss", (), F32, _HEAD)
    losses.tape.record("mean", (losses,), (), lambda node, grads, saved: (grads[0],), loss)
    return loss
