"""The step through the caching allocator: which blocks its tensors really get.

What a tensor is charged depends on the block that was free when it was asked for, so the history
decides: how the model was made, a first step that ends with the optimizer's states, and the steady
step after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from msgspec import Struct, structs

from estimator.dtypes import DType
from estimator.eager.size import Polynomial, asked_bytes, elements
from estimator.eager.tensor import Regime, Section, TensorKind
from estimator.memory.buffer_reuse import planned
from estimator.memory.caching_allocator import (
    DEFAULT_SETTINGS,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemory,
)
from estimator.memory.clipping import clipping_temporaries
from estimator.memory.hessian_pass import HESSIAN
from estimator.memory.loading import LOADING, added, loading
from estimator.memory.optimizer_log import StepEvent
from estimator.memory.recordings import Recordings
from estimator.memory.standing import (
    IMPORTANCE,
    importance_sizes,
    kept_states,
    tensors_with_states,
)
from estimator.memory.trace import Recording
from estimator.model.loading import Event
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


# Dimensions of a matrix: the Trainer puts these into its first group.
MATRIX: Final = 2


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
    replayer.load(loading(run))
    replayer.add(size for _, size in added(run))
    update = recordings.update
    clipping = clipping_temporaries(run)
    for number, (regime, at) in enumerate(turns):
        replayer.highest.clear()
        passes = recordings.steady(regime) if number else recordings.first(regime)
        for micro_batches, prefix in zip(passes, ("", HESSIAN), strict=False):
            for recording in micro_batches:
                replayer.drop_batch()
                replayer.of(recording, prefix, at)
                replayer.step()
            replayer.pass_through("gradient clipping", clipping)
            replayer.update(() if prefix else update.later if number else update.first)
    return replayer.found()


def first_states(run: Run) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the optimizer's states, tensor by tensor, managed ones left out."""
    kept = kept_states(run)
    for each in tensors_with_states(run):
        for _ in range(each.count):
            yield from (
                (f"{each.name}.{state.name}", state.bytes(each))
                for state in kept
                if not state.managed(each)
            )
    for name, size, count in importance_sizes(run):
        yield from ((f"{name}.{score}", size) for _ in range(count) for score in IMPORTANCE)


class _Replayer:
    """Feeds steps to the allocator and remembers, for each moment, its highest point.

    Tensors of the step are known to the allocator by their number, all else by what it is.
    """

    recording: Recording
    prefix: str
    sizes: list[int]
    log: tuple[Section, ...]
    names: dict[int, int]

    def __init__(self, run: Run, card: _Card, settings: AllocatorSettings) -> None:
        self.run = run
        self.workspace = card.workspace
        self.allocator = CachingAllocator(card.capacity, settings)
        self.warm: set[str] = set()
        self.highest: dict[str, tuple[int, int]] = {}
        self.loading = (0, 0)
        # What is left behind a pass: gradients, and all else that has a name.
        self.gradients: list[tuple[int, TensorKind]] = []
        self.others: list[int] = []

    def of(self, recording: Recording, prefix: str, at: Polynomial) -> None:
        """Go over to another pass of a step, whose moments have names that begin with a word."""
        self.recording, self.prefix = recording, prefix
        kinds = recording.kinds
        self.sizes = [asked_bytes(each.shape, each.dtype.width, at) for each in kinds]
        self.log, self.names = recording.log, {}
        if self.run.settings.compiled:
            self.log, self.names = planned(recording.log, kinds, self.sizes, recording.outside)

    def load(self, events: Iterable[Event]) -> None:
        """Make the model."""
        allocator, most, asked = self.allocator, 0, 0
        for serial, _, _, size in events:
            if serial < 0:
                allocator.empty_cache()
                continue
            if size is None:
                allocator.free(("loaded", serial))
                continue
            allocator.take(("loaded", serial), size)
            if allocator.allocated_bytes > most:
                most, asked = allocator.allocated_bytes, allocator.requested_bytes
        self.loading = (most, asked)

    def add(self, sizes: Iterable[int]) -> None:
        """Allocate what is there beside the model before the first step."""
        for number, size in enumerate(sizes):
            self.allocator.take(("added", number), size)

    def step(self) -> None:
        """Run forward and backward."""
        allocator, sizes = self.allocator, self.sizes
        take, free = allocator.take, allocator.free
        for section in self.log:
            most = asked = 0
            product = self._first_product(section)
            for serial, kind in section.events:
                if kind is None:
                    free(serial)
                    continue
                take(serial, sizes[kind])
                if serial == product:
                    self._warm(section.phase)
                if allocator.allocated_bytes > most:
                    most, asked = allocator.allocated_bytes, allocator.requested_bytes
            self._see(self._name(section.phase, section.site), most, asked)
        self._leave()

    def _first_product(self, section: Section) -> int | None:
        """Return the number of what a thread multiplies first, if it is in a section.

        The backward thread does so in the head, unless the loss runs the head itself.
        """
        if section.phase in self.warm:
            return None
        recording = self.recording
        if section.phase == "forward" and recording.first_product is not None:
            return recording.first_product
        head = len(recording.sites) - 2
        if section.phase == "backward" and any(each.site == head for each in self.log):
            made = (serial for serial, kind in section.events if kind is not None)
            return next(made, None) if section.site == head else None
        self._warm(section.phase)
        return None

    def drop_batch(self) -> None:
        """Drop what a micro-batch has left, but for gradients, to which the next one adds."""
        for serial in self.others:
            self.allocator.free(serial)
        self.others = []

    def _leave(self) -> None:
        """Remember what a pass has left."""
        kinds = self.recording.kinds
        for serial, kind in self.recording.left.items():
            name = self.names.get(serial, serial)
            if kinds[kind].component == "gradients":
                self.gradients.append((name, kinds[kind]))
            else:
                self.others.append(name)

    def update(self, events: tuple[StepEvent, ...]) -> None:
        """Run the optimizer's step, then drop gradients and batch."""
        allocator = self.allocator
        copies = self._copy_gradients()
        most, asked = allocator.allocated_bytes, allocator.requested_bytes
        for key, size in events:
            if size is None:
                allocator.free(key)
                continue
            allocator.take(key, size)
            if allocator.allocated_bytes > most:
                most, asked = allocator.allocated_bytes, allocator.requested_bytes
        self._see("optimizer step", most, asked)
        for serial in copies:
            allocator.free(("copy", serial))
        if not self.run.keeps_gradients:
            for serial, _ in self.gradients:
                allocator.free(serial)
        self.gradients = []
        self.drop_batch()

    def _copy_gradients(self) -> list[int]:
        """Copy half gradients to fp32 one by one, each original dropped at once; return which.

        Source: megatron-optimizer, _copy_model_grads_to_main_grads.
        """
        optimizer = self.run.optimizer
        if not optimizer.master_weights or optimizer.main_gradients:
            return []
        # Backward ends with the first layer; the Trainer's group of matrices is the first one.
        halves = [each for each in reversed(self.gradients) if each[1].dtype.is_half]
        halves.sort(key=lambda each: len(each[1].shape) < MATRIX)
        for serial, kind in halves:
            self.allocator.take(("copy", serial), elements(kind.shape)[0] * DType.FLOAT32.width)
            self.allocator.free(serial)
        copied = [serial for serial, _ in halves]
        self.gradients = [each for each in self.gradients if not each[1].dtype.is_half]
        return copied

    def pass_through(self, name: str, temporaries: tuple[int, ...]) -> None:
        """Hold temporaries for a moment."""
        allocator = self.allocator
        for number, size in enumerate(temporaries):
            allocator.take(("temporary", number), size)
        self._see(name, allocator.allocated_bytes, allocator.requested_bytes)
        for number, _ in enumerate(temporaries):
            allocator.free(("temporary", number))

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

    def _warm(self, phase: str) -> None:
        """Give a thread its cuBLAS workspace when it first multiplies."""
        if phase not in self.warm:
            self.warm.add(phase)
            self.allocator.take(("workspace", phase), self.workspace)

    def _see(self, name: str, handed: int, asked: int) -> None:
        name = self.prefix + name
        if handed > self.highest.get(name, (0, 0))[0]:
            self.highest[name] = (handed, asked)

    def _name(self, phase: str, site: int) -> str:
        name = self.recording.sites[site]
        return f"loss {phase}" if name == "loss" else f"{phase}: {name}"
