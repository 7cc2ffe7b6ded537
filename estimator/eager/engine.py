"""The backward engine: the order in which nodes run and when their tensors die."""

from __future__ import annotations

import heapq
import sys
from typing import Any, Final, Union

from estimator.dtypes import DType
from estimator.eager.size import elements
from estimator.eager.tensor import ENGINE, Edge, Leaf, Node, Param, Tape, Tensor

Target = Union[Node, Param]
Buffers = dict[Target, "list[Tensor | None]"]


def backward(loss: Tensor, grad: Tensor | None = None) -> None:
    """Run backward from a tensor; gradients of parameters stay in `tape.grads`.

    A node runs once all gradients of its outputs have arrived, the newest ready node first; a
    parameter takes its gradient as soon as all of its contributions have arrived, which for a tied
    head is at the very end. Saved tensors and incoming gradients die when their node has run.

    Args:
        loss: a scalar, or any tensor whose gradient is given.
        grad: the gradient to begin with; a scalar's is made here.

    Source: torch-autograd, engine.cpp, Engine::evaluate_function and ReadyQueue.
    """
    if loss.edge is None or not isinstance(loss.edge.target, Node):
        raise ValueError("the loss depends on nothing that wants a gradient")
    root = loss.edge.target
    tape = root.tape
    waiting = _contributions(root)
    first: list[Tensor | None] = [None] * root.outputs
    first[loss.edge.output] = grad or root.scratch("gradient of the loss", loss.shape, loss.dtype)
    buffers: Buffers = {root: first}
    del first
    ready = [(-root.order, root)]
    while ready:
        _, node = heapq.heappop(ready)
        tape.enter(node.site)
        tape.prefix = ""
        grads = _run(node, buffers.pop(node))
        complete: list[Param] = []
        for edge in node.inputs:
            moved = [grads.pop(0)]
            if edge is None:
                continue
            if moved[0] is not None:
                _deliver(edge, moved, buffers)
            waiting[edge.target] -= 1
            if waiting[edge.target] == 0 and edge.target in buffers:
                if isinstance(edge.target, Node):
                    heapq.heappush(ready, (-edge.target.order, edge.target))
                else:
                    complete.append(edge.target)
        for param in complete:
            _accumulate(tape, param, buffers.pop(param))


def _contributions(root: Node) -> dict[Target, int]:
    """Count for each node and parameter how many gradients will be delivered to it."""
    counts: dict[Target, int] = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().inputs:
            if edge is None:
                continue
            if edge.target not in counts:
                counts[edge.target] = 0
                if isinstance(edge.target, Node):
                    stack.append(edge.target)
            counts[edge.target] += 1
    return counts


def _run(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Return a node's gradients, each of the shape and type of its input, and free what it saved.

    A gradient of a larger shape (broadcast) is summed, one of another type is cast, after all of
    the node's gradients exist (torch-autograd, engine.cpp, validate_outputs).
    """
    out = _apply(node, grads)
    for number, meta in enumerate(node.metas):
        if node.inputs[number] is None:
            out[number] = None
        grad = out[number]
        if grad is None or meta is None:
            continue
        if grad.shape != meta[0] and elements(grad.shape) != elements(meta[0]):
            out[number] = grad = node.new_grad(number, meta[0], grad.dtype)
        if grad.dtype is not meta[1]:
            out[number] = grad = node.new_grad(number)
    grads.clear()
    node.saved.clear()
    return out


def _apply(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
    saved = [each.unpack() if isinstance(each, Packed) else each for each in node.saved]
    return list(node.rule(node, grads, saved))


class Packed:
    """What a node keeps in place of a saved tensor while a checkpoint records."""

    def unpack(self) -> Any:
        """Return the tensor, recomputed if need be."""
        raise NotImplementedError


def _deliver(edge: Edge, moved: list[Tensor | None], buffers: Buffers) -> None:
    """Put a gradient into its target's buffer, adding to what is there.

    The sum is made in place when the buffer holds the last reference to a tensor that is no view,
    and out of place otherwise (torch-autograd, input_buffer.cpp, can_accumulate_inplace).
    """
    outputs = edge.target.outputs if isinstance(edge.target, Node) else 1
    buffer = buffers.setdefault(edge.target, [None] * outputs)
    if buffer[edge.output] is None:
        buffer[edge.output] = moved.pop()
    elif _references(buffer, edge.output) != _SOLE:
        old = buffer[edge.output]
        assert old is not None
        buffer[edge.output] = _sum(edge, old)
    moved.clear()


def _sum(edge: Edge, old: Tensor) -> Tensor:
    tape = old.tape
    if isinstance(edge.target, Param):
        return tape.new(f"{edge.target.name}.grad", old.shape, old.dtype, ENGINE, "gradients")
    name = f"{edge.target.name}, backward: sum of gradients"
    return tape.new(name, old.shape, old.dtype, ENGINE)


def _references(buffer: list[Tensor | None], output: int) -> tuple[int, int]:
    """Count what refers to a buffered gradient and to its storage."""
    old = buffer[output]
    assert old is not None
    return sys.getrefcount(old), sys.getrefcount(old.storage)


def _sole_owner() -> tuple[int, int]:
    """Measure what `_references` counts for a tensor that only its buffer refers to."""
    tape = Tape()
    return _references([tape.new("probe", (), DType.FLOAT32, ENGINE)], 0)


_SOLE: Final = _sole_owner()


def _is_part(grad: Tensor) -> bool:
    return grad.base is not None and elements(grad.shape) != elements(grad.base.shape)


def _accumulate(tape: Tape, param: Param, buffer: list[Tensor | None]) -> None:
    """Hand a parameter its gradient: kept as it is, or added in place to the one that is there.

    A gradient that is a part of a larger tensor does not lie as the parameter does, so it is
    written out anew. With the optimizer in backward, the parameter is updated here, and its
    gradient dies, unless the optimizer does not have the parameter.

    Source: torch-autograd, functions/accumulate_grad.h, AccumulateGrad::accumulateGrad, and
    functions/accumulate_grad.cpp, AccumulateGrad::apply for the hook;
    utils/grad_layout_contract.h, obeys_layout_contract.
    """
    if isinstance(param, Leaf):
        param.grad = buffer.pop()
        return
    gradient = [each for each in buffer if each is not None]
    buffer.clear()
    if not gradient:
        return
    if _is_part(gradient[0]):
        shape, dtype = gradient[0].shape, gradient[0].dtype
        gradient = [tape.new(f"{param.name}.grad", shape, dtype, ENGINE, "gradients")]
    if param.keeps_gradient:
        if tape.first_step:
            tape.kept[param] = gradient.pop()
        return
    if tape.update is not None and param.held is None:
        tape.update.accumulate(tape, param, gradient)
    elif tape.gathers_gradients and param.held is None:
        tape.results.append(gradient.pop())
    elif not tape.grads_exist or param.held is not None:
        tape.grads[param] = gradient.pop()
