"""What an optimizer's step asks the allocator for, tensor by tensor, in order.

States are made where the library makes them: before the first tensor of a group is updated, or
each when its tensor's turn comes, between the temporaries of the one before and its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from estimator.memory.loading_parts import modules
from estimator.memory.standing import (
    IMPORTANCE,
    copied_back,
    importance_sizes,
    kept_states,
    step_temporaries,
    tensors_with_states,
)
from estimator.run import Run
from estimator.techniques.optimizers import OPTIMIZERS, Trained, trained
from estimator.techniques.optimizers.row import layout
from estimator.techniques.optimizers.temporaries import Groups, Step, trainer_groups

Key = tuple[str, int]
StepEvent = tuple[Key, "int | None"]
"""What is asked for and how much [bytes], or None where it is given back."""


class OptimizerLog(NamedTuple):
    """The events of the first step, in which the states are made, and of any later one."""

    first: tuple[StepEvent, ...]
    later: tuple[StepEvent, ...]


def optimizer_log(run: Run) -> OptimizerLog:
    """Run the step of a run's optimizer over every tensor of the model."""
    if run.forward_only or run.optimizer.in_backward:
        return _at_once(run)
    if OPTIMIZERS[run.optimizer.name].spends_gradients:
        # Such a step counts alike tensors together.
        return _at_once(run)
    return _in_turn(run)


def _every(run: Run) -> tuple[Trained, ...]:
    """Describe every trained tensor to the optimizer, those of all layers, in the model's order."""
    master, model = run.optimizer.master_weights, layout(run)
    return tuple(
        trained(module, weight, 1, master=master, layout=model)
        for module in modules(run)
        for weight in module.weights()
        if weight.trained
    )


def _states_of(run: Run) -> Callable[[Trained], tuple[int, ...]]:
    kept = kept_states(run)

    def sizes(each: Trained) -> tuple[int, ...]:
        return tuple(state.bytes(each) for state in kept if not state.managed(each))

    return sizes


class _Log(Step):
    """A step that writes down what comes and goes."""

    def __init__(self, states: Callable[[Trained], tuple[int, ...]]) -> None:
        super().__init__()
        self.states = states
        self.events: list[StepEvent] = []
        self.begun = False
        self._sizes: dict[int, int] = {}
        self._serial = 0

    def born(self, sizes: tuple[int, ...]) -> int:
        self._serial += 1
        self._sizes[self._serial] = len(sizes)
        for number, size in enumerate(sizes):
            self.events.append(((f"temporary {number}", self._serial), size))
        return self._serial

    def died(self, number: int) -> None:
        count = self._sizes.pop(number)
        self.events += [((f"temporary {each}", number), None) for each in range(count)]

    def begin(self, each: Trained) -> None:
        self.begun = True
        self.events += self.of_states(each)

    def of_states(self, each: Trained) -> list[StepEvent]:
        """Return the births of a tensor's states."""
        sizes = self.states(each)
        self._serial += 1
        return [((f"state {number}", self._serial), size) for number, size in enumerate(sizes)]


def _in_turn(run: Run) -> OptimizerLog:
    choice, tensors = run.optimizer, _every(run)
    row = OPTIMIZERS[choice.name]
    one = row.groups_itself or choice.of_blocks
    groups: Groups = (tensors,) if one else trainer_groups(tensors)
    log = _Log(_states_of(run))
    events: list[StepEvent] = []
    if run.keeps_every_state:
        # Those of other layers have been made in earlier turns.
        events += _every_state(run, log)
        log.states = _none
    for group in groups:
        if not group:
            continue
        log.events, log.begun = [], False
        row.updates[choice.implementation](log, group, choice)
        if not log.begun:
            events += [event for each in group for event in log.of_states(each)]
        events += log.events
    events += _averages(run)
    events += _for_a_moment("copied back", copied_back(run))
    return _split(events)


def _none(each: Trained) -> tuple[int, ...]:
    return ()


def _every_state(run: Run, log: _Log) -> Iterator[StepEvent]:
    for each in tensors_with_states(run):
        for _ in range(each.count):
            yield from log.of_states(each)


def _for_a_moment(name: str, sizes: tuple[int, ...]) -> Iterator[StepEvent]:
    yield from (((name, number), size) for number, size in enumerate(sizes))
    yield from (((name, number), None) for number, _ in enumerate(sizes))


def _averages(run: Run) -> Iterator[StepEvent]:
    """Yield AdaLoRA's scores, and what an average of them is made of."""
    sizes = importance_sizes(run)
    for number, (_, size, count) in enumerate(sizes):
        yield from (
            ((f"state {score} {each}", -number), size)
            for each in range(count)
            for score in IMPORTANCE
        )
    largest = max((size for _, size, _ in sizes), default=0)
    yield from _for_a_moment("average", (largest,) * 3 if largest else ())


def _at_once(run: Run) -> OptimizerLog:
    """Return all states, and what is there at the worst moment beside them."""
    log = _Log(_states_of(run))
    states = _every_state(run, log)
    return _split([*states, *_for_a_moment("temporary", step_temporaries(run))])


def _split(events: list[StepEvent]) -> OptimizerLog:
    later = [event for event in events if not event[0][0].startswith("state")]
    return OptimizerLog(tuple(events), tuple(later))
