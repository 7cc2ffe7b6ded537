"""Where in the model an operator works: the module that runs, or the one that its backward undoes.

In forward, hooks say which module runs. In backward there is none; but each node of the graph has
the number that autograd counted when its forward operator ran, so the module that ran at that
number is the place of the node.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch

# The nodes that put a gradient into `.grad` carry no number of their own but this one.
_ACCUMULATE_GRAD: Final = 2**64 - 1


class Place(NamedTuple):
    """A module path, and the index of the decoder layer that it belongs to."""

    path: str
    layer: int | None


NOWHERE: Final = Place("", None)


class Places:
    """Follow a model through forward, recomputation and backward.

    Args:
        layers: dotted path of the module list that holds the decoder layers, or None.
    """

    def __init__(self, layers: str | None) -> None:
        self._layers = layers
        self._pattern = re.compile(rf"{re.escape(layers)}\.(\d+)(\.|$)") if layers else None
        self._paths: dict[int, str] = {}
        self._parameters: dict[int, str] = {}
        self._stack: list[str] = []
        self._starts: list[int] = [0]
        self._started: list[Place] = [NOWHERE]
        # The layer that was entered last, until a module outside the layers is entered.
        self.layer: int | None = None

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module, *, hears: bool = True) -> Iterator[None]:
        """Know the modules and parameters of a model, and hear when a module starts and ends.

        Args:
            hears: False for compiled code, in which modules neither start nor end.
        """
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._parameters = {id(tensor): path for path, tensor in model.named_parameters()}
        handles = (
            []
            if not hears
            else [
                torch.nn.modules.module.register_module_forward_pre_hook(self._enter),
                torch.nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
            ]
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def now(self) -> Place:
        """Return the place of the operator that is running."""
        if self._stack:
            return Place(self._stack[-1], self.layer)
        node = torch._C._current_autograd_node()
        if node is None:
            return Place("", self.layer)
        sequence = node._sequence_nr()
        if sequence == _ACCUMULATE_GRAD:
            return self.of_parameter(getattr(node, "variable", None))
        return self._started[bisect_right(self._starts, sequence) - 1]

    def of_parameter(self, parameter: Any) -> Place:
        """Return the place of a parameter of the model; nowhere for anything else."""
        return self.of_path(self._parameters.get(id(parameter), ""))

    def of_path(self, path: str) -> Place:
        """Return the place that a dotted path names."""
        match = self._pattern.search(path) if self._pattern else None
        return Place(path, int(match[1]) if match else None)

    def shown(self, place: Place) -> str:
        """Return the path of a place with the index of its layer written `*`."""
        if place.layer is None or self._pattern is None:
            return place.path
        return self._pattern.sub(lambda match: match[0].replace(match[1], "*"), place.path)

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        path = self._paths.get(id(module))
        if path is None:
            return
        self._stack.append(path)
        layer = self.of_path(path).layer
        # Between two layers their parent runs, and still works for the layer before.
        if layer is not None or len(self._stack) == 1 or not self._holds_layers(path):
            self.layer = layer
        self._note()

    def _leave(self, module: torch.nn.Module, *_: Any) -> None:
        path = self._paths.get(id(module))
        if path is None or path not in self._stack:
            return
        # A recomputation that stops early leaves inner modules without their hook.
        while self._stack.pop() != path:
            pass
        self._note()

    def _note(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._started.append(Place(self._stack[-1] if self._stack else "", self.layer))

    def _holds_layers(self, path: str) -> bool:
        return self._layers is not None and f"{self._layers}.".startswith(
            f"{path}." if path else ""
        )
