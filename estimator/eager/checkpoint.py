"""Activation checkpointing: drop what a region saves, recompute it when backward asks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from estimator.eager.engine import Packed, backward
from estimator.eager.host import OnHost, SaveOnHost
from estimator.eager.tensor import Edge, Leaf, Node, Param, Storage, Tensor

Region = Callable[..., Tensor]
ATTENTION: Final = "attention"
PRODUCT: Final = "mm"


class Checkpointing(Struct, frozen=True):
    """How the step recomputes.

    Args:
        scope: what is recomputed: whole `layers`, the `attention` of each layer, or nothing
            (`none`), where every saved tensor is kept in host memory instead.
        every: of the layers, only every n-th is checkpointed, beginning with the first.
        reentrant: torch's older implementation, with a backward inside the backward; None: as the
            training stack does by default.
        saves_products: every second matrix product and attention's output are kept.
        offload: what stays for the recomputation is kept in host memory.
    """

    scope: str = "layers"
    every: int = 1
    reentrant: bool | None = None
    saves_products: bool = False
    offload: bool = False


def checkpoint(
    how: Checkpointing, region: Region, *inputs: Tensor, keeps_inputs: bool = True
) -> Tensor:
    """Run a region without keeping what it saves; only its inputs stay alive.

    Args:
        keeps_inputs: False where the recomputation makes the inputs again too.

    Backward reruns the region up to the last tensor that was saved, when the first of them is
    wanted (non-reentrant checkpointing with early stop).

    Source: torch-checkpoint, _checkpoint_without_reentrant_generator and _CheckpointFrame.
    """
    if how.reentrant:
        return _reentrant(how, region, *inputs)
    tape = inputs[0].tape
    outer = tape.frame, tape.products
    frame = _Frame(region, inputs, how, keeps_inputs)
    tape.frame, tape.products = frame, frame.products
    try:
        return region(*inputs)
    finally:
        tape.frame, tape.products = outer


class _Frame:
    """One checkpointed region: its inputs, and holders of what it would have saved."""

    def __init__(
        self, region: Region, inputs: tuple[Tensor, ...], how: Checkpointing, keeps_inputs: bool
    ) -> None:
        tape = inputs[0].tape
        kept = _Kept if keeps_inputs else _Again
        self.region = region
        self.tape = tape
        self.inputs = tuple(OnHost(tape, each) if how.offload else kept(each) for each in inputs)
        self.wanted = tuple(each.requires_grad for each in inputs)
        self.prefix = tape.prefix
        self.autocast_enabled = tape.autocast_enabled
        self.products = Products() if how.saves_products else None
        self.holders: list[weakref.ref[_Holder]] = []
        self.recomputed = False

    def pack(self, tensor: Tensor | Param) -> Packed:
        """Return what a node keeps in place of a tensor; weights are asked for like the others."""
        holder = _Holder(self)
        self.holders.append(weakref.ref(holder))
        return holder

    def recompute(self) -> None:
        """Run the region again, handing each tensor that it saves to its holder."""
        self.recomputed = True
        tape = self.tape
        before = tape.frame, tape.products, tape.prefix, tape.autocast_enabled, tape.cast_cache
        tape.frame, tape.prefix = _Recorder(self.holders), self.prefix
        tape.products = self.products.again() if self.products is not None else None
        tape.autocast_enabled, tape.cast_cache = self.autocast_enabled, {}
        try:
            self.region(*map(_leaf, (each.unpack() for each in self.inputs), self.wanted))
        except _AllRecomputedError:
            pass
        finally:
            (
                tape.frame,
                tape.products,
                tape.prefix,
                tape.autocast_enabled,
                tape.cast_cache,
            ) = before


def _leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """Return an input of a region, detached from the graph that it came from."""
    out = Tensor(tensor.tape, tensor.shape, tensor.dtype, tensor.storage)
    if wanted:
        out.edge = Edge(Leaf("input", out.shape, out.dtype, requires_grad=True))
    return out


class _Kept(Packed):
    """An input of a region that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.tensor


class _Again(Packed):
    """An input of a region that is made again."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.storage is not None
        self.tape, self.shape, self.dtype = tensor.tape, tensor.shape, tensor.dtype
        self.kind = tensor.storage.kind

    def unpack(self) -> Tensor:
        return Tensor(self.tape, self.shape, self.dtype, Storage(self.tape, self.kind))


class _Recorder:
    """Takes the place of a frame while its region is recomputed."""

    def __init__(self, holders: list[weakref.ref[_Holder]]) -> None:
        self.holders = holders
        self.position = 0

    def pack(self, tensor: Tensor | Param) -> Tensor | Param:
        holder = self.holders[self.position]()
        if holder is not None:
            holder.tensor = _detached(tensor)
        self.position += 1
        if self.position == len(self.holders):
            raise _AllRecomputedError
        return _detached(tensor)


def _detached(tensor: Tensor | Param) -> Tensor | Param:
    """Return the same memory without the graph; a weight is itself."""
    if isinstance(tensor, Param):
        return tensor
    return Tensor(tensor.tape, tensor.shape, tensor.dtype, tensor.storage)


class _AllRecomputedError(Exception):
    """Everything that backward needs is there; the rest of the region need not run."""


class _Holder(Packed):
    """Stands for one saved tensor of a checkpointed region."""

    __slots__ = ("frame", "tensor")

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.tensor: Tensor | Param | None = None

    def unpack(self) -> Tensor | Param:
        if not self.frame.recomputed:
            self.frame.recompute()
        # Each is handed out once and kept no longer, so it dies before the node's gradients are
        # summed and cast (unpack_hook).
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        return tensor


class Products:
    """Results that a region keeps for its recomputation, which takes them in place of new ones.

    Attention's output and log-sum-exp are kept, and of the plain matrix products (`aten.mm`: a
    layer without a bias) the first, the third and so on. They live until the recomputation has
    taken them, or until the frame dies.

    Source: torchtitan, _apply_op_sac; torch-checkpoint, _CachingTorchDispatchMode.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], Storage | None] = {}
        self.counts: dict[str, int] = {}
        self.taking = False

    def again(self) -> Products:
        """Begin the recomputation."""
        self.counts.clear()
        self.taking = True
        return self

    def takes(self, operator: str, tensor: Tensor) -> bool:
        """Whether the result of an operator is one that was kept; it gets that storage."""
        if not self.taking:
            return False
        number = self._count(operator)
        tensor.storage = self.kept.pop((operator, number), None)
        return tensor.storage is not None

    def keep(self, operator: str, tensor: Tensor) -> None:
        """Keep a new result, if it is one of those that are kept."""
        if self.taking:
            return
        number = self._count(operator)
        if operator == ATTENTION or (operator == PRODUCT and number % 2 == 0):
            self.kept[operator, number] = tensor.storage

    def _count(self, operator: str) -> int:
        number = self.counts.get(operator, 0)
        self.counts[operator] = number + 1
        return number


def _reentrant(how: Checkpointing, region: Region, *inputs: Tensor) -> Tensor:
    """Run a region without a graph; backward runs it again with one, and goes back through it.

    Beside the inputs, the region's output and its gradient live while that happens. The region is
    always run to its end.

    Source: torch-checkpoint, CheckpointFunction.
    """
    tape = inputs[0].tape
    prefix, autocast_enabled = tape.prefix, tape.autocast_enabled
    wanted = tuple(each.requires_grad for each in inputs)
    recording, tape.recording = tape.recording, False
    try:
        given = region(*inputs)
    finally:
        tape.recording = recording
    out = Tensor(tape, given.shape, given.dtype, given.storage)

    def rule(node: Node, grads: list[Tensor], saved: list[Tensor]) -> tuple[Tensor | None, ...]:
        before = tape.prefix, tape.autocast_enabled, tape.cast_cache
        tape.prefix, tape.autocast_enabled, tape.cast_cache = prefix, autocast_enabled, {}
        leaves = tuple(map(_leaf, saved, wanted))
        result = region(*leaves)
        tape.prefix, tape.autocast_enabled, tape.cast_cache = before
        backward(result, grads[0])
        return tuple(_gradient(each) for each in leaves)

    outer = tape.frame
    if how.offload:
        tape.frame = SaveOnHost(tape)
    tape.record("checkpoint", inputs, inputs, rule, out)
    tape.frame = outer
    return out


def _gradient(leaf: Tensor) -> Tensor | None:
    target: Any = leaf.edge.target if leaf.edge is not None else None
    return target.grad if isinstance(target, Leaf) else None
