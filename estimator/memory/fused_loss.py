"""Losses that take hidden states and the head's weight, so that no full logits ever exist."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Node, Param, Tape, Tensor, view
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import ModelSpec
from estimator.sources import Cite
from estimator.units import ceil_div, next_power_of_2

TOKENS: Final[Shape] = (BATCH, SEQ)


class FusedLoss(Struct, frozen=True):
    """A loss that runs the head itself; the model's outputs hold no logits."""

    def rows(self, spec: ModelSpec, tokens: int) -> int | None:
        """Return the rows of one chunk, or None where one chunk covers all tokens."""
        return None

    def __call__(self, forward: Forward, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        raise NotImplementedError


# -- Liger -----------------------------------------------------------------------------------------

_LIGER: Final = Cite(
    "liger", "ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward"
)
_CAST: Final = "weight, autocast to {}"
_LIGER_LABELS: Final = Cite("liger", "transformers/model/loss_utils.py, LigerForCausalLMLoss")


class FusedLinear(FusedLoss, frozen=True):
    """Liger's fused linear cross entropy: gradients are made in forward, chunk by chunk.

    Shapes:
        gradient of the hidden states  [b, s, h]  width of the hidden states, saved
        gradient of the head           [V, h]     width of the weight, saved; if it is trained
        logits of one chunk            [c, V]     width of the hidden states
        product before its sum         [V, h]     4 bytes, where the weight is fp32 and not autocast

    The chunk has c = next power of two of ceil(b·s / ceil(V / h)) rows, at most b·s.

    Source: liger, ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> int | None:
        factor = ceil_div(spec.vocab.value, spec.hidden.value)
        rows = next_power_of_2(ceil_div(tokens, factor))
        return rows if rows < tokens else None

    def __call__(self, forward: Forward, hidden: Tensor, labels: Tensor) -> Tensor:
        tape = hidden.tape
        padded = tape.new("labels padded", TOKENS, DType.INT64, _LIGER_LABELS)
        shifted = tape.new("labels shifted", TOKENS, DType.INT64, _LIGER_LABELS)
        flat = view(hidden, hidden.shape)
        weight = head_weight(forward)
        loss, grad_input, grad_weight = self._forward(forward, hidden, weight)
        del padded, shifted

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            return saved[0], saved[1]

        tape.record("fused_linear", (flat, weight), (grad_input, grad_weight), rule, loss)
        return loss

    def _forward(
        self, forward: Forward, hidden: Tensor, weight: Param
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tape, vocab = hidden.tape, forward.spec.vocab
        rows = chunk_of(tape)
        grad_input = tape.new("gradient of the hidden states", hidden.shape, hidden.dtype, _LIGER)
        grad_weight = weight_gradient(tape, weight, _LIGER) if weight.requires_grad else None
        losses = tape.new("loss of each token", TOKENS, F32, _LIGER)
        counted = tape.new("tokens that count", TOKENS, DType.BOOL, _LIGER)
        half = tape.autocast if tape.autocast_enabled else None
        in_buffer = hidden.dtype is weight.dtype and half in (None, hidden.dtype)
        buffer = None
        if in_buffer:
            buffer = tape.new("logits of a chunk", (*rows, vocab), hidden.dtype, _LIGER)
        for _ in range(rounds(tape)):
            if not in_buffer:
                self._autocast_chunk(forward, hidden, weight, grad_weight is not None)
            elif grad_weight is not None and weight.dtype is F32:
                tape.new("gradient of the head from a chunk", weight.shape, F32, _LIGER)
        del buffer, counted
        loss = tape.new("loss", (), F32, _LIGER)
        del losses
        return loss, grad_input, grad_weight

    def _autocast_chunk(
        self, forward: Forward, hidden: Tensor, weight: Param, trained: bool
    ) -> None:
        """Run one chunk where autocast casts the hidden states or the weight.

        The first product takes a view of the weight, whose cast is never cached; the second takes
        the weight itself, whose cast is.
        """
        tape, half, rows = hidden.tape, hidden.tape.autocast, chunk_of(hidden.tape)
        assert half is not None
        shape = (*rows, *hidden.shape[2:])
        casts_input, casts_weight = hidden.dtype is not half, weight.dtype is not half
        casts = [tape.new("chunk in half", shape, half, _LIGER)] if casts_input else []
        if casts_weight:
            casts.append(tape.new(_CAST.format(half.label), weight.shape, half, _LIGER))
        logits = tape.new("logits of a chunk", (*rows, forward.spec.vocab), half, _LIGER)
        casts.clear()
        if casts_weight and weight not in tape.cast_cache:
            casts.append(tape.new(_CAST.format(half.label), weight.shape, half, _LIGER))
            if weight.requires_grad and weight.dtype is F32:
                tape.cast_cache[weight] = casts[0]
        tape.new("gradient of a chunk", shape, half, _LIGER)
        casts.clear()
        if trained and casts_input:
            tape.new("chunk in half", shape, half, _LIGER)
        del logits


# -- cut cross entropy -----------------------------------------------------------------------------

_CCE: Final = Cite("cut-cross-entropy", "cce.py, LinearCrossEntropyFunction")
_CCE_BACKWARD: Final = Cite("cut-cross-entropy", "cce_backward.py, cce_backward_kernel")
_CCE_VALIDS: Final = Cite("cut-cross-entropy", "utils.py, _build_flat_valids")


class CutCrossEntropy(FusedLoss, frozen=True):
    """Cut cross entropy: logits live in registers only, and are computed again in backward.

    Shapes:
        saved: log-sum-exp            [b, s]  4 bytes
        saved: positions that count   [b, s]  8 bytes
        saved: mean logits            [V]     4 bytes; they order the vocabulary for the filter
        backward: gradients           [b, s, h] and [V, h], width of the hidden states each
        backward: gradient of the head in fp32, where the weight is

    Source: cut-cross-entropy, cce.py, LinearCrossEntropyFunction; cce_backward.py.
    """

    def __call__(self, forward: Forward, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the loss.

        Raises:
            UnsupportedCombinationError: hidden states in fp32, which its backward refuses.
        """
        tape, vocab = hidden.tape, forward.spec.vocab
        if not hidden.dtype.is_half:
            raise UnsupportedCombinationError(
                "cut_cross_entropy 25.1.1 takes bf16 and fp16 hidden states only, and those of "
                "this run are fp32; choose precision bf16, or loss fused_linear or chunked"
            )
        weight = head_weight(forward)
        positions = self._positions(tape)
        flat = view(hidden, hidden.shape)
        lse = tape.new("log-sum-exp", TOKENS, F32, _CCE)
        average = tape.new("mean logits", (vocab,), F32, _CCE)
        negative = tape.new("negative logits of the labels", TOKENS, F32, _CCE)
        loss = tape.new("loss", (), F32, _CCE)
        del negative

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            return _cce_backward(node, vocab)

        saved = (flat, weight, lse, labels, positions, average)
        tape.record("cut_cross_entropy", (flat, weight), saved, rule, loss)
        return loss

    def _positions(self, tape: Tape) -> Tensor:
        counted = tape.new("tokens that count", TOKENS, DType.BOOL, _CCE_VALIDS)
        pairs = (*TOKENS, dim("2", 2))
        indices = tape.new("indices of the tokens", pairs, DType.INT64, _CCE_VALIDS)
        del counted
        short = tape.new("indices of the tokens, 4 bytes", pairs, DType.INT32, _CCE_VALIDS)
        del indices
        positions = tape.new("positions that count", TOKENS, DType.INT64, _CCE_VALIDS)
        del short
        return positions


def _cce_backward(node: Node, vocab: Dim) -> Out:
    sorted_logits = [
        node.scratch("sorted mean logits", (vocab,), F32, _CCE),
        node.scratch("order of the vocabulary", (vocab,), DType.INT64, _CCE),
    ]
    order = node.scratch("order of the vocabulary, 4 bytes", (vocab,), DType.INT32, _CCE)
    sorted_logits.clear()
    into_hidden = node.new_grad(0, source=_CCE_BACKWARD)
    into_weight = None
    if node.wants(1):
        half = node.meta_of(0)[1]
        made = node.new_grad(1, dtype=half, source=_CCE_BACKWARD)
        same = node.meta_of(1)[1] is half
        into_weight = made if same else node.new_grad(1, source=_CCE_BACKWARD)
        del made
    del order
    return into_hidden, into_weight


# -- what they share -------------------------------------------------------------------------------


def head_weight(forward: Forward) -> Param:
    """Return the head's weight, which a fused loss reads past the module."""
    head = forward.spec.head
    return forward.param(head.name, head.weight())


def chunk_of(tape: Tape) -> Shape:
    """Return the leading dimensions of one chunk: some rows, or the whole micro-batch."""
    rows = tape.regime.loss_rows
    return TOKENS if rows is None else (dim("c", rows),)


def rounds(tape: Tape) -> int:
    """Chunks that it takes to see what all of them do: what one leaves, the next one finds."""
    return 1 if tape.regime.loss_rows is None else 2


def weight_gradient(tape: Tape, weight: Param, source: Cite) -> Tensor:
    """Allocate the gradient of the head's weight in the forward pass."""
    outer, tape.prefix = tape.prefix, ""
    out = tape.new(f"{weight.name}.grad", weight.shape, weight.dtype, source, "gradients")
    tape.prefix = outer
    return out
