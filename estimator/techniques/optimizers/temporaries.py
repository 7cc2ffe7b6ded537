"""What the step of an optimizer holds at its worst moment: its code, run on sizes alone.

A function of this package follows the upstream step line by line. Every intermediate result is a
`Scratch`, which is alive as long as a Python name or expression refers to it, as a tensor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from estimator.dtypes import DType
from estimator.run import OptimizerChoice
from estimator.techniques.optimizers.row import Trained

FP32 = DType.FLOAT32.width


class Step:
    """One step under way: what is alive, and what was when it was most.

    Args:
        worst: sizes of the temporaries that were alive then [bytes].
        worst_spent: gradients that the step had dropped by then, and how many of each.
    """

    def __init__(self) -> None:
        self.worst: tuple[int, ...] = ()
        self.worst_spent: dict[Trained, int] = {}
        self._spent: dict[Trained, int] = {}
        self._alive: dict[int, tuple[int, ...]] = {}
        self._total = self._most = self._born = 0

    def new(self, *sizes: int, held: object = None) -> Scratch:
        """Allocate tensors of some sizes [bytes]; what is `held` dies no earlier than now."""
        return Scratch(self, tuple(size for size in sizes if size))

    def like(self, each: Trained, held: object = None) -> Scratch:
        """Allocate a tensor as large as a trained one, in its type."""
        return Scratch(self, (each.bytes,))

    def fp32(self, each: Trained, held: object = None) -> Scratch:
        """Allocate a tensor as large as a trained one, in fp32."""
        return Scratch(self, (each.elements * FP32,))

    def every(self, tensors: Iterable[Trained], held: object = None) -> Scratch:
        """Allocate a list with a tensor for each trained one, as a foreach operator does."""
        return Scratch(self, tuple(each.bytes for each in tensors for _ in range(each.count)))

    def begin(self, each: Trained) -> None:
        """Hear that the turn of a tensor has come."""

    def born(self, sizes: tuple[int, ...]) -> int:
        """Count tensors that begin to live."""
        self._born += 1
        self._alive[self._born] = sizes
        self._total += sum(sizes)
        if self._total > self._most:
            self._most = self._total
            self.worst = tuple(size for group in self._alive.values() for size in group)
            self.worst_spent = dict(self._spent)
        return self._born

    def spend(self, each: Trained, count: int) -> None:
        """Drop the gradients of some alike tensors, which the caller keeps otherwise."""
        self._total -= each.bytes * count
        self._spent[each] = self._spent.get(each, 0) + count

    def died(self, number: int) -> None:
        """Count tensors that have died."""
        self._total -= sum(self._alive.pop(number))


class Scratch:
    """Temporaries that are born together and die with the last reference to them."""

    __slots__ = ("number", "step")

    def __init__(self, step: Step, sizes: tuple[int, ...]) -> None:
        self.step = step
        self.number = step.born(sizes)

    def __del__(self) -> None:
        self.step.died(self.number)


Update = Callable[[Step, tuple[Trained, ...], OptimizerChoice], None]
"""The step of an optimizer over tensors of one parameter group."""


Groups = tuple[tuple[Trained, ...], ...]


def worst_moment(update: Update, groups: Groups, choice: OptimizerChoice) -> Step:
    """Return a step that has been run, with what was alive at its worst moment."""
    step = Step()
    for group in groups:
        if group:
            update(step, group, choice)
    return step


def trainer_groups(tensors: tuple[Trained, ...]) -> Groups:
    """Return the Trainer's two groups: matrices have weight decay, vectors have none.

    Source: hf-trainer, Trainer.create_optimizer.
    """
    return (
        tuple(each for each in tensors if each.rows),
        tuple(each for each in tensors if not each.rows),
    )


def in_turn(tensors: tuple[Trained, ...], step: Step | None = None) -> Iterator[Trained]:
    """Yield tensors in the order of the model, layers no more than twice: the rest repeat them.

    Args:
        step: is told of each, where the library makes a tensor's states when its turn comes.
    """
    for each in _twice(tensors):
        if step is not None:
            step.begin(each)
        yield each


def _twice(tensors: tuple[Trained, ...]) -> Iterator[Trained]:
    repeated: list[Trained] = []
    for each in (*tensors, None):
        if each is not None and each.count > 1:
            repeated.append(each)
            continue
        yield from repeated * 2
        repeated.clear()
        if each is not None:
            yield each


def by_dtype(tensors: tuple[Trained, ...]) -> Iterator[tuple[Trained, ...]]:
    """Yield the tensors of each type, which a foreach implementation updates together."""
    groups: dict[DType, list[Trained]] = {}
    for each in tensors:
        groups.setdefault(each.dtype, []).append(each)
    for group in groups.values():
        yield tuple(group)


def nothing(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run a kernel that updates everything in place."""
