"""The step through the caching allocator: which blocks its tensors really get.

What a tensor is charged depends on the block that was free when it was asked for, so the history
decides: the weights as loaded, a first step that ends with the optimizer's states, and the steady
step after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from estimator.eager.size import Polynomial
from estimator.eager.tensor import Birth, Regime
from estimator.memory.caching_allocator import CachingAllocator
from estimator.memory.standing import optimizer_states, step_temporaries, trained_tensors
from estimator.memory.trace import Recording, record
from estimator.run import Run


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the allocator adds to the tensors of a run [bytes].

    Args:
        rounding: for each moment, blocks handed out less bytes asked for, at its highest point.
        reserved: the most that the allocator held in segments.
    """

    rounding: dict[str, int]
    reserved: int


def blocks(run: Run, regime: Regime, at: Polynomial, workspace: int) -> Blocks:
    """Replay a run at one micro-batch and length.

    Args:
        at: powers of the micro-batch and length.
        workspace: bytes of one cuBLAS workspace.
    """
    replayer = _Replayer(record(run, regime), at, workspace)
    replayer.load(_loaded(run))
    states = tuple(_states(run))
    temporaries = step_temporaries(run)
    replayer.step()
    replayer.update(states, temporaries)
    replayer.highest.clear()
    replayer.step()
    replayer.update((), temporaries)
    return replayer.found()


def _loaded(run: Run) -> Iterator[int]:
    """Yield the sizes of the weights, buffers and standing gradients, in the order of the model."""
    spec = run.spec
    modules = list(spec.embeddings)
    for index in spec.pattern:
        modules += spec.kinds[index].modules
    modules += [*spec.final, *(() if spec.tied else (spec.head,))]
    weights = [weight for module in modules for weight in module.weights()]
    yield from (weight.bytes for weight in weights)
    yield from (weight.bytes for weight in weights if weight.trainable and run.accumulates)


def _states(run: Run) -> Iterator[int]:
    """Yield the sizes of the optimizer's states, tensor by tensor, managed memory left out."""
    for each in trained_tensors(run):
        for _ in range(each.count):
            yield from (
                state.bytes(each) for state in optimizer_states(run) if not state.managed(each)
            )


class _Replayer:
    """Feeds steps to the allocator and remembers, for each moment, its highest point."""

    def __init__(self, recording: Recording, at: Polynomial, workspace: int) -> None:
        self.recording = recording
        self.sizes = [kind.size[0] * at[kind.size[1]] for kind in recording.kinds]
        self.workspace = workspace
        self.allocator = CachingAllocator()
        self.round = 0
        self.asked = 0
        self.handed = 0
        self.charged: dict[tuple[int, int], tuple[int, int]] = {}
        self.highest: dict[str, tuple[int, int]] = {}

    def load(self, sizes: Iterator[int]) -> None:
        """Allocate what is there before the first step."""
        for number, size in enumerate(sizes):
            self._allocate((-1, number), size)

    def step(self) -> None:
        """Run forward and backward."""
        self.round += 1
        names: dict[tuple[str, int], str] = {}
        for event in self.recording.log:
            key = (self.round, event.serial)
            if not isinstance(event, Birth):
                self._release(key)
                continue
            where = (event.phase, event.site)
            if where not in names:
                names[where] = self._name(*where)
                self._warm(event.phase)
            self._allocate(key, self.sizes[event.kind])
            self._see(names[where])

    def update(self, states: tuple[int, ...], temporaries: tuple[int, ...]) -> None:
        """Run the optimizer's step, then drop gradients and batch."""
        for number, size in enumerate(states):
            self._allocate((-2, number), size)
        for number, size in enumerate(temporaries):
            self._allocate((-3, number), size)
        self._see("optimizer step")
        for number, _ in enumerate(temporaries):
            self._release((-3, number))
        for key in [key for key in self.charged if key[0] == self.round]:
            self._release(key)

    def found(self) -> Blocks:
        """Return what the steady step showed."""
        rounding = {name: handed - asked for name, (handed, asked) in self.highest.items()}
        return Blocks(rounding, self.allocator.stats.peak_reserved_bytes)

    def _warm(self, phase: str) -> None:
        """Give a thread its cuBLAS workspace when it first multiplies."""
        key = (0, 0 if phase == "forward" else 1)
        if key not in self.charged:
            self._allocate(key, self.workspace)

    def _allocate(self, key: tuple[int, int], size: int) -> None:
        block = self.allocator.malloc(key, size).charged_bytes
        self.charged[key] = (size, block)
        self.asked += size
        self.handed += block

    def _release(self, key: tuple[int, int]) -> None:
        size, block = self.charged.pop(key)
        self.allocator.free(key)
        self.asked -= size
        self.handed -= block

    def _see(self, name: str) -> None:
        if self.handed > self.highest.get(name, (0, 0))[0]:
            self.highest[name] = (self.handed, self.asked)

    def _name(self, phase: str, site: int) -> str:
        name = self.recording.sites[site]
        return f"loss {phase}" if name == "loss" else f"{phase}: {name}"
