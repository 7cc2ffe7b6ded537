"""Activation checkpointing: drop what a region saves, recompute it when backward asks."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from estimator.eager.engine import Packed
from estimator.eager.tensor import Edge, Param, Tensor

Region = Callable[[Tensor], Tensor]


def checkpoint(region: Region, hidden: Tensor) -> Tensor:
    """Run a region without keeping what it saves; only its input stays alive.

    Backward reruns the region up to the last tensor that was saved, when the first of them is
    wanted (non-reentrant checkpointing with early stop).

    Source: torch-checkpoint, _checkpoint_without_reentrant_generator and _CheckpointFrame.
    """
    tape = hidden.tape
    outer, tape.frame = tape.frame, _Frame(region, hidden)
    try:
        return region(hidden)
    finally:
        tape.frame = outer


class _Frame:
    """One checkpointed region: its input, and holders of what it would have saved."""

    def __init__(self, region: Region, hidden: Tensor) -> None:
        self.region = region
        self.input: Tensor = hidden
        self.prefix = hidden.tape.prefix
        self.autocast_enabled = hidden.tape.autocast_enabled
        self.holders: list[weakref.ref[_Holder]] = []
        self.recomputed = False

    def pack(self, tensor: Tensor) -> Packed:
        holder = _Holder(self)
        self.holders.append(weakref.ref(holder))
        return holder

    def recompute(self) -> None:
        """Run the region again, handing each tensor that it saves to its holder."""
        self.recomputed = True
        tape = self.input.tape
        before = tape.frame, tape.prefix, tape.autocast_enabled, tape.cast_cache
        tape.frame, tape.prefix = _Recorder(self.holders), self.prefix
        tape.autocast_enabled, tape.cast_cache = self.autocast_enabled, {}
        leaf = Tensor(tape, self.input.shape, self.input.dtype, self.input.storage)
        if self.input.requires_grad:
            leaf.edge = Edge(Param("input", leaf.shape, leaf.dtype, requires_grad=True))
        try:
            self.region(leaf)
        except _AllRecomputedError:
            pass
        finally:
            tape.frame, tape.prefix, tape.autocast_enabled, tape.cast_cache = before


class _Recorder:
    """Takes the place of a frame while its region is recomputed."""

    def __init__(self, holders: list[weakref.ref[_Holder]]) -> None:
        self.holders = holders
        self.position = 0

    def pack(self, tensor: Tensor) -> Tensor:
        holder = self.holders[self.position]()
        if holder is not None:
            holder.tensor = Tensor(tensor.tape, tensor.shape, tensor.dtype, tensor.storage)
        self.position += 1
        if self.position == len(self.holders):
            raise _AllRecomputedError
        return Tensor(tensor.tape, tensor.shape, tensor.dtype, tensor.storage)


class _AllRecomputedError(Exception):
    """Everything that backward needs is there; the rest of the region need not run."""


class _Holder(Packed):
    """Stands for one saved tensor of a checkpointed region."""

    __slots__ = ("frame", "tensor")

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.tensor: Tensor | None = None

    def unpack(self) -> Tensor:
        if not self.frame.recomputed:
            self.frame.recompute()
        # Each is handed out once and kept no longer, so it dies before the node's gradients are
        # summed and cast (unpack_hook).
        tensor, self.tensor = self.tensor, None
        assert tensor is not None
        return tensor
