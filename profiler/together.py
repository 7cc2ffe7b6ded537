"""Several optimizers that share the parameters of a model and step one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

Group = dict[str, Any]

_MUON_LEARNING_RATE: Final = 1e-3


class Together:
    """Optimizers that a training loop steps one after the other, as one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of all parts; those of a later one where two have the same."""
        return {name: value for part in self.parts for name, value in part.defaults.items()}

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """States by parameter."""
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self) -> None:
        """Step each part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def muon(model: Any, groups: list[Group], rest: Callable[[list[Group]], Any]) -> Together:
    """Return Muon over the hidden matrices, and another optimizer over what is left.

    Hidden are two-dimensional parameters outside of embedding tables and the head.

    Source: torch.optim.Muon, example; KellerJordan/Muon, README.md, Usage.
    """
    import torch

    outer = {id(p) for p in model.get_output_embeddings().parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            outer |= {id(p) for p in module.parameters()}
    hidden = [p for group in groups for p in group["params"] if p.ndim == 2 and id(p) not in outer]
    taken = {id(p) for p in hidden}
    others = [
        {**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups
    ]
    others = [group for group in others if group["params"]]
    parts = [torch.optim.Muon(hidden, lr=_MUON_LEARNING_RATE)] if hidden else []
    return Together([*parts, rest(others)] if others else parts)
