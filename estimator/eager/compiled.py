"""Operators of a model that torch.compile has compiled as a whole: what its two graphs keep.

Three things decide it. AOTAutograd's partitioner cuts the joint graph where the fewest bytes cross,
and may recompute whatever inductor can fuse; so casts and products of a norm, rotary tables, the
activated gate and the log-softmax are not kept, while inputs of matrix products and of attention
are. Inductor fuses neighbours into kernels, so what only they pass on is never written. And the
backward graph is given a gradient for every output of the forward graph, the logits among them.
"""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.attention import MASK
from estimator.eager.ops import F32, Grads, Operand, Out
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Node, Param, Tape, Tensor, reshaped
from estimator.sources import Cite
from estimator.units import round_up

_CUT: Final = Cite("torch-partitioner", "min_cut_rematerialization_partition")
_FUSED: Final = Cite("torch-inductor", "scheduler.py, Scheduler.fuse_nodes")
_TANGENTS: Final = Cite("torch-autograd", "python_function.cpp, PyNode::apply")
_TABLE: Final = Cite("torch-inductor", "decomposition.py, embedding_dense_backward")
_SUM: Final = Cite("torch-inductor", "fx_passes/post_grad.py, addmm")
_ALIGNMENT_BYTES: Final = 128
_SHORT_ROW: Final = 1024
_MASK: Final = Cite("hf-masking", "_ignore_causal_mask_sdpa: never while compiling, torch < 2.14")


def rms_norm(x: Tensor, weight: Param) -> Tensor:
    """RMSNorm in one kernel; keeps its input and one number for each row.

    Under autocast the kernel writes what the matrix products take, once for all of them.

    Shapes:
        saved: input     the input's own memory
        saved: 1 / rms   [b, s]     4 bytes
        output           [b, s, h]  width of the input, or of what autocast casts to

    Source: torch-partitioner, min_cut_rematerialization_partition; torch-inductor, scheduler.py,
    Scheduler.fuse_nodes.
    """
    tape = x.tape
    rstd = tape.new("1 / rms", x.shape[:-1], F32, _CUT)
    out = tape.new("output", x.shape, _computed(tape, x.dtype), _FUSED)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        into_weight = node.new_grad(1, source=_FUSED) if node.wants(1) else None
        # Written over the gradient of the residual that the same kernel adds.
        return (reshaped(grad, grad.shape) if node.wants(0) else None), into_weight

    tape.record("rms_norm", (x, weight), (x, weight, rstd), rule, out)
    return out


def padded(width: Dim, dtype: DType) -> Dim:
    """Return the distance of rows in a buffer: long rows begin at multiples of 128 bytes.

    Source: torch-inductor, ir.py, Layout._pad_strides; config.py, padding_stride_threshold.
    """
    aligned = _ALIGNMENT_BYTES // dtype.width
    if width.value <= _SHORT_ROW or width.value % aligned == 0:
        return width
    return dim(f"{width.letter} padded", round_up(width.value, aligned))


def _computed(tape: Tape, dtype: DType) -> DType:
    """Return the type in which matrix products take a tensor of some type."""
    return tape.autocast if tape.autocast is not None and tape.autocast_enabled else dtype


def residual(x: Tensor, before: Tensor, *, again: bool) -> Tensor:
    """Add a sublayer's output to its residual.

    The sum of two tensors of one type is written over the output, or computed again from the two:
    the same bytes. Under autocast the residual is fp32. The sum is then written out and kept, for
    the partitioner bounds how long a chain of fused operators it computes again; only the first
    sum of the chain is computed again.

    Args:
        again: it is the first sum of the chain.

    Shapes:
        sum  [b, s, h]  width of the residual, where the output has another

    Source: torch-partitioner, ban_recompute_long_fusible_chains.
    """
    if x.dtype is before.dtype:
        return ops.add_in_place(x, before, "residual")
    if not again:
        return ops.add(x, before, "residual")
    out = Tensor(x.tape, before.shape, before.dtype, x.storage, base=x.base or x)
    x.tape.record("residual", (x, before), (), lambda node, grads, saved: (grads[0], grads[0]), out)
    return out


def rotated(x: Tensor) -> Tensor:
    """Rotary positions; the tables are computed in the kernel, and nothing is kept.

    Source: torch-inductor, scheduler.py, Scheduler.fuse_nodes.
    """
    return ops.unary(x, "rotated", keeps="nothing", operator="mul.Tensor")


def gated(gate: Tensor, up: Tensor, *, adapted: bool = False) -> Tensor:
    """`silu(gate) * up` in one kernel; backward computes the activated gate again.

    Args:
        adapted: gate and up have fp32 adapters, for which the kernel of backward writes fp32
            gradients beside those of the frozen weights, from an fp32 gradient of their product.

    Shapes:
        saved: gate, up                 [b, s, f]  their own memory
        output                          [b, s, f]
        backward: gradients in fp32, 3  [b, s, f]  4 bytes each, with adapters

    Source: torch-partitioner, min_cut_rematerialization_partition; torch-inductor, scheduler.py,
    Scheduler.fuse_nodes.
    """
    out = gate.tape.new("gated product", gate.shape, gate.dtype, _FUSED)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        # Autocast computes adapters in the type of the frozen weights.
        shape = node.meta_of(0)[0]
        copies = range(3 if adapted and node.tape.autocast is None else 0)
        held = [node.scratch("gradient in fp32", shape, F32, _FUSED) for _ in copies]
        into = node.new_grad(0, source=_FUSED), node.new_grad(1, source=_FUSED)
        held.clear()
        return into

    gate.tape.record("gated product", (gate, up), (gate, up), rule, out)
    return out


def mask(tape: Tape, dtype: DType) -> Tensor:
    """The mask that transformers builds while it is compiled, in the type that attention adds.

    It is kept for backward.

    Shapes:
        mask  [b, 1, s, s]  width of the queries

    Source: hf-masking, _ignore_causal_mask_sdpa.
    """
    return tape.new("full attention mask", MASK, dtype, _MASK)


def embedding(ids: Tensor, weight: Operand, width: Dim, of_head: list[Tensor]) -> Tensor:
    """Rows of a table; backward adds them up in an fp32 table of zeros, and casts that.

    Args:
        of_head: what a head that is tied to the table has kept for the sum of both gradients,
            which is a tensor of its own.

    Shapes:
        sums of rows                      [V, h]  4 bytes, where the weight has another type
        their cast, beside a head's       [V, h]  width of the weight

    Source: torch-inductor, decomposition.py, embedding_dense_backward.
    """
    out = ids.tape.new("output", (*ids.shape, width), weight.dtype, _TABLE)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        shape, dtype = node.meta_of(0)
        sums = None
        if of_head or dtype is not F32:
            sums = node.scratch("sums of rows", shape, F32, _TABLE)
        if of_head and dtype is not F32:
            sums = node.scratch("sums of rows, cast", shape, dtype, _TABLE)
        grad = node.new_grad(0, source=_TABLE)
        del sums
        of_head.clear()
        return (grad,)

    ids.tape.record("embedding", (weight,), (ids,), rule, out)
    return out


def tied_head(x: Tensor, weight: Param, width: Dim, of_head: list[Tensor]) -> Tensor:
    """A product with the table of the embeddings, whose gradient is made where theirs is.

    The graph adds the two gradients of the weight once, at the end. Without a cast in between the
    product that makes the head's is fused into that sum, and waits for it with all that it reads;
    under autocast the product stands, in its own type.

    Args:
        of_head: keeps either until then.

    Shapes:
        saved: input, and the weight's cast under autocast
        kept for the sum: gradient of the logits  [b, s, V]  and the input, or
        gradient before its cast                  [V, h]     2 bytes, under autocast

    Source: torch-inductor, fx_passes/post_grad.py, addmm: a sum with a product.
    """
    tape = x.tape
    half = ops.autocast_to_half(x)
    casts = half.dtype is not weight.dtype
    matrix: Operand = weight
    if casts:
        matrix = tape.new("weight, autocast", weight.shape, half.dtype, _FUSED)
    out = Tensor(tape, (*x.shape[:-1], width), half.dtype, None)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        if node.wants(1) and casts:
            shape, _ = node.meta_of(1)
            of_head.append(node.scratch("gradient before its cast", shape, half_type, _SUM))
        elif node.wants(1):
            of_head.extend(each for each in (grads[0], saved[0]) if each is not None)
        into_x = node.new_grad(0, source=_SUM) if node.wants(0) else None
        return (reshaped(into_x, into_x.shape) if into_x is not None else None), None

    half_type = half.dtype
    tape.record("linear", (half, weight), (half, matrix), rule, out)
    tape.allocate(out, "output", _SUM)
    return out


def loss(logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
    """Cross entropy whose fp32 logits and log-softmax are never written.

    The logits are an output of the forward graph, so the backward graph is handed a gradient for
    them: zeros, as nobody uses them.

    Under autocast the outputs are another tensor, so the gradient is written over the logits, if
    its rows need no padding.

    Shapes:
        saved: logits             [b, s, V]  their own memory
        saved: maxima, log-sums   [b, s]     4 bytes each
        saved: labels, shifted    [b, s]     8 bytes; really s + 1 positions
        zeros for the logits      [b, s, V]  width of the outputs' logits
        gradient of the logits    [b, s, V]  width of the logits, unless written over them; rows
                                             padded

    Source: torch-partitioner, min_cut_rematerialization_partition; torch-inductor, scheduler.py,
    Scheduler.fuse_nodes; torch-autograd, python_function.cpp, PyNode::apply: zeros for what has no
    gradient; torch-aot, graph_compile.py, collect_fw_donated_buffer_idxs.
    """
    tape = logits.tape
    shifted = tape.new("labels, shifted", (BATCH, SEQ), DType.INT64, _CUT)
    handed_out = tape.autocast is None
    rows = tuple(tape.new(name, (BATCH, SEQ), F32, _CUT) for name in ("maxima", "log-sums"))
    out = tape.new("loss", (), F32, _FUSED)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        shape, dtype = node.meta_of(0)
        zeros = node.scratch("zeros for the logits", shape, dtype if handed_out else F32, _TANGENTS)
        wide = (*shape[:-1], padded(shape[-1], dtype))
        if handed_out or wide != shape:
            grad = node.new_grad(0, wide, source=_FUSED)
        else:
            grad = reshaped(saved[0], shape)
        del zeros
        # A view: the padding behind the rows is nobody's.
        grad = reshaped(grad, shape)
        return (grad,)

    tape.record("cross entropy", (logits,), (logits, labels, shifted, *rows), rule, out)
    return out
