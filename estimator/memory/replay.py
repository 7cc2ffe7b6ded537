"""The step through the caching allocator: which blocks its tensors really get.

What a tensor is charged depends on the block that was free when it was asked for, so the history
decides: how the model was made, a first step that ends with the optimizer's states, and the steady
step after it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, NamedTuple

from msgspec import Struct, structs

from estimator.dtypes import DType
from estimator.eager.size import Polynomial, asked_bytes, elements
from estimator.eager.tensor import Regime, TensorKind
from estimator.memory.buffer_reuse import planned
from estimator.memory.caching_allocator import (
    DEFAULT_SETTINGS,
    AllocatorSettings,
    CachingAllocator,
    Call,
    OutOfMemory,
)
from estimator.memory.clipping import clipping_temporaries
from estimator.memory.hessian_pass import HESSIAN
from estimator.memory.loading import LOADING
from estimator.memory.master_copies import is_first_group
from estimator.memory.optimizer_log import StepEvent
from estimator.memory.recordings import Recordings
from estimator.memory.trace import Recording
from estimator.run import Run


class Blocks(Struct, frozen=True):
    """What the allocator adds to the tensors of a run [bytes].

    Args:
        rounding: for each moment, blocks handed out less bytes asked for, at its highest point.
        reserved: the most that the allocator held in segments.
        pinned: the most that it held in segments with something in them; these it cannot give
            back, so that with less memory the run dies.
        fits: whether the card has room for it.
        requested: the most that was asked for at one time, whatever the blocks.
    """

    rounding: dict[str, int]
    reserved: int
    requested: int
    pinned: int
    fits: bool = True


class Turn(NamedTuple):
    """One step of the history: its regime, and powers of its micro-batch and length."""

    regime: Regime
    at: Polynomial


class Conditions(Struct, frozen=True):
    """What decides about blocks beside the run itself.

    Args:
        settings: of the allocator.
        earlier: the steps before the one in question.
    """

    settings: AllocatorSettings = DEFAULT_SETTINGS
    earlier: tuple[Turn, ...] = ()


NORMAL: Final = Conditions()


def blocks(
    recordings: Recordings,
    turn: Turn,
    workspace: int,
    capacity: int | None,
    conditions: Conditions = NORMAL,
    *,
    unbounded: Blocks | None = None,
) -> Blocks:
    """Replay a run at one micro-batch and length.

    Near the end of its memory the allocator gives free segments back and holds less, so the card
    decides too. A run that does not fit the card is replayed as if it had room.

    Args:
        workspace: bytes of one cuBLAS workspace.
        capacity: what the card leaves to the allocator [bytes], None without a card.
        conditions: what decides beside the run itself.
        unbounded: what the same replay found without a card, if that is known.
    """
    card, roomy = _Card(workspace, capacity), _Card(workspace, None)
    free = unbounded
    # A card changes nothing that is never filled; one with less than the tensors never is enough.
    # Room for addresses, which expandable segments have, depends on the card in any case.
    if not conditions.settings.expandable_segments:
        free = free or _replayed(recordings, turn, roomy, conditions)
        if capacity is None or capacity >= free.reserved:
            return free
        if capacity < free.requested:
            return structs.replace(free, fits=False)
    try:
        tight = _replayed(recordings, turn, card, conditions)
    except OutOfMemory:
        free = free or _replayed(recordings, turn, roomy, conditions)
        return structs.replace(free, fits=False)
    # What cannot be given back is asked of a run that gave nothing back.
    return tight if free is None else structs.replace(tight, pinned=free.pinned)


class _Card(NamedTuple):
    """What the device decides [bytes]."""

    workspace: int
    capacity: int | None


def _replayed(recordings: Recordings, turn: Turn, card: _Card, conditions: Conditions) -> Blocks:
    run = recordings.run
    # A step that comes after another is a steady one.
    turns = (*(conditions.earlier or (turn,)), turn)
    replayer = _Replayer(run, card, conditions.settings)
    replayer.load(recordings)
    update, clipping = recordings.update, clipping_temporaries(run)
    known: dict[tuple[int, Polynomial], _Asked] = {}
    for number, (regime, at) in enumerate(turns):
        replayer.highest.clear()
        passes = recordings.steady(regime) if number else recordings.first(regime)
        for micro_batches, prefix in zip(passes, ("", HESSIAN), strict=False):
            for recording in micro_batches:
                asked = known.get((id(recording), at))
                if asked is None:
                    asked = _asked(recording, at, compiled=run.settings.compiled)
                    known[id(recording), at] = asked
                replayer.drop_batch()
                replayer.prefix = prefix
                replayer.step(asked)
            replayer.pass_through("gradient clipping", clipping)
            replayer.update(() if prefix else update.later if number else update.first)
    return replayer.found()


class _Calls(NamedTuple):
    """What a section of a step asks for, and the name of its moment."""

    phase: str
    site: int
    name: str
    calls: list[Call]


class _Asked(NamedTuple):
    """What a recorded pass asks for at one micro-batch and length.

    Args:
        names: the number under which a tensor was asked for, if it took the place of another.
    """

    recording: Recording
    sections: list[_Calls]
    names: dict[int, int]


def _asked(recording: Recording, at: Polynomial, *, compiled: bool) -> _Asked:
    """Return a recorded pass with the sizes that its tensors have."""
    kinds, sites = recording.kinds, recording.sites
    sizes = [asked_bytes(each.shape, each.dtype.width, at) for each in kinds]
    log, names = recording.log, dict[int, int]()
    if compiled:
        log, names = planned(log, kinds, sizes, recording.outside)
    sections = [
        _Calls(
            phase,
            site,
            f"loss {phase}" if sites[site] == "loss" else f"{phase}: {sites[site]}",
            [(serial, None if kind is None else sizes[kind]) for serial, kind in events],
        )
        for phase, site, events in log
    ]
    return _Asked(recording, sections, names)


class _Replayer:
    """Feeds steps to the allocator and remembers, for each moment, its highest point.

    Tensors of the step are known to the allocator by their number, all else by what it is.
    """

    def __init__(self, run: Run, card: _Card, settings: AllocatorSettings) -> None:
        self.run = run
        self.workspace = card.workspace
        self.allocator = CachingAllocator(card.capacity, settings)
        self.warm: set[str] = set()
        self.highest: dict[str, tuple[int, int]] = {}
        self.loading = (0, 0)
        # Of names of moments.
        self.prefix = ""
        # What is left behind a pass: gradients, and all else that has a name.
        self.gradients: list[tuple[int, TensorKind]] = []
        self.others: list[int] = []

    def load(self, recordings: Recordings) -> None:
        """Make the model, and what is beside it before the first step."""
        allocator = self.allocator
        first, *others = recordings.loading
        self.loading = allocator.serve(first)
        for part in others:
            allocator.empty_cache()
            handed, asked = allocator.serve(part)
            if handed > self.loading[0]:
                self.loading = (handed, asked)
        allocator.serve(recordings.added)

    def step(self, asked: _Asked) -> None:
        """Run forward and backward."""
        for section in asked.sections:
            calls = self._with_workspace(asked, section)
            self._see(section.name, *self.allocator.serve(calls))
        self._leave(asked)

    def _with_workspace(self, asked: _Asked, section: _Calls) -> list[Call]:
        """Return what a section asks for, with a workspace of cuBLAS for a thread's first product.

        The backward thread multiplies first in the head, unless the loss runs the head itself.
        """
        phase, recording = section.phase, asked.recording
        if phase in self.warm:
            return section.calls
        workspace = (("workspace", phase), self.workspace)
        head = len(recording.sites) - 2
        if phase == "forward" and recording.first_product is not None:
            product: Hashable = recording.first_product
        elif phase == "backward" and any(each.site == head for each in asked.sections):
            if section.site != head:
                return section.calls
            product = next((serial for serial, size in section.calls if size is not None), None)
        else:
            # Before all else, and so before the highest point is looked for.
            self.warm.add(phase)
            self.allocator.serve((workspace,))
            return section.calls
        for number, (serial, size) in enumerate(section.calls, start=1):
            if size is not None and serial == product:
                self.warm.add(phase)
                return [*section.calls[:number], workspace, *section.calls[number:]]
        return section.calls

    def drop_batch(self) -> None:
        """Drop what a micro-batch has left, but for gradients, to which the next one adds."""
        self.allocator.serve((serial, None) for serial in self.others)
        self.others = []

    def _leave(self, asked: _Asked) -> None:
        """Remember what a pass has left."""
        kinds = asked.recording.kinds
        for serial, kind in asked.recording.left.items():
            name = asked.names.get(serial, serial)
            if kinds[kind].component == "gradients":
                self.gradients.append((name, kinds[kind]))
            else:
                self.others.append(name)

    def update(self, events: tuple[StepEvent, ...]) -> None:
        """Run the optimizer's step, then drop gradients and batch."""
        allocator = self.allocator
        copies = self._copy_gradients()
        before = allocator.allocated_bytes, allocator.requested_bytes
        found = allocator.serve(events)
        self._see("optimizer step", *(found if found[0] > before[0] else before))
        allocator.serve((("copy", serial), None) for serial in copies)
        if not self.run.keeps_gradients:
            allocator.serve((serial, None) for serial, _ in self.gradients)
        self.gradients = []
        self.drop_batch()

    def _copy_gradients(self) -> list[int]:
        """Copy half gradients to fp32 one by one, each original dropped at once; return which.

        Source: megatron-optimizer, _copy_model_grads_to_main_grads.
        """
        optimizer = self.run.optimizer
        if not optimizer.master_weights or optimizer.main_gradients:
            return []
        # Backward ends with the first layer.
        halves = [each for each in reversed(self.gradients) if each[1].dtype.is_half]
        halves.sort(key=lambda each: not is_first_group(each[1].shape))
        for serial, kind in halves:
            self.allocator.take(("copy", serial), elements(kind.shape)[0] * DType.FLOAT32.width)
            self.allocator.free(serial)
        copied = [serial for serial, _ in halves]
        self.gradients = [each for each in self.gradients if not each[1].dtype.is_half]
        return copied

    def pass_through(self, name: str, temporaries: tuple[int, ...]) -> None:
        """Hold temporaries for a moment."""
        allocator = self.allocator
        allocator.serve((("temporary", number), size) for number, size in enumerate(temporaries))
        self._see(name, allocator.allocated_bytes, allocator.requested_bytes)
        allocator.serve((("temporary", number), None) for number, _ in enumerate(temporaries))

    def found(self) -> Blocks:
        """Return what loading and the steady step showed."""
        highest = {LOADING: self.loading, **self.highest}
        rounding = {name: handed - asked for name, (handed, asked) in highest.items()}
        stats = self.allocator.stats
        return Blocks(
            rounding=rounding,
            reserved=stats.peak_reserved_bytes,
            requested=stats.peak_requested_bytes,
            pinned=stats.peak_pinned_bytes,
        )

    def _see(self, name: str, handed: int, asked: int) -> None:
        name = self.prefix + name
        if handed > self.highest.get(name, (0, 0))[0]:
            self.highest[name] = (handed, asked)
