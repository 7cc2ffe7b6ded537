"""What making a model asks of the allocator: tensors that come and go, in order."""

from __future__ import annotations

from typing import Final, NamedTuple

from estimator.components import Component
from estimator.units import MiB

LARGEST_SMALL: Final = MiB
"""Requests up to this size share segments of 2 MiB, and one that is freed soon needs no new one."""


class Event(NamedTuple):
    """A tensor that comes, or one that goes.

    Args:
        serial: names the tensor from its coming to its going; below zero for `EMPTIED`.
        name: the tensor; empty where one goes.
        component: what it is counted as.
        size: its bytes; None where a tensor goes.
    """

    serial: int
    name: str = ""
    component: Component = "weights"
    size: int | None = None


EMPTIED: Final = Event(-1)
"""`torch.cuda.empty_cache()`: segments without a tensor in them go back to the driver."""


class Loading:
    """The history of a model from an empty device to its training."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def new(self, name: str, size: int, component: Component = "weights") -> int:
        """Allocate a tensor of so many bytes and return its number."""
        serial = len(self.events)
        self.events.append(Event(serial, name, component, size))
        return serial

    def scratch(self, name: str, size: int) -> tuple[int, ...]:
        """Allocate a tensor that is none of the model's; small ones leave no trace."""
        return (self.new(name, size, "workspace"),) if size > LARGEST_SMALL else ()

    def empty_cache(self) -> None:
        """Give free segments back to the driver."""
        self.events.append(EMPTIED)

    def drop(self, *tensors: tuple[int, ...]) -> None:
        """Free tensors, the first of them first."""
        self.events += [Event(serial) for serials in tensors for serial in serials]
