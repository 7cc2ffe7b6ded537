"""torchao's optimizer in host memory, as it is, with streams and pinned memory stood for.

All tensors of the dry run are on one device. Those that torchao keeps on the host are named to the
meter, which leaves them out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import torch

from estimator.optimizer import Optimizer


class Offloaded:
    """torchao's CPUOffloadOptimizer, with what the dry run asks of an optimizer."""

    def __init__(self, groups: list[dict[str, Any]], asked: Optimizer, lr: float) -> None:
        library = _library()
        register = torch.Tensor.register_post_accumulate_grad_hook
        with mock.patch.object(
            torch.Tensor,
            "register_post_accumulate_grad_hook",
            lambda parameter, hook: register(parameter, _without_streams(hook)),
        ):
            self.library = library.CPUOffloadOptimizer(
                [dict(group) for group in groups],
                offload_gradients=asked.offload_gradients,
                minimal_size=asked.minimal_size,
                lr=lr,
            )
        on_device = self.library.d_opt
        self.parts = [*self.library.optim_dict.values(), *([on_device] if on_device else [])]
        self.masters = list(self.library.param_d2h_map.items())
        self.defaults: Final = {"fused": True}

    @property
    def on_host(self) -> Iterator[Any]:
        """The weights and gradients in pinned memory."""
        for _, host in self.masters:
            yield host
            yield host.grad

    def moves(self, parameter: Any) -> bool:
        """Whether a parameter of the model is updated on the host."""
        return parameter in self.library.param_d2h_map

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """States by parameter of the model."""
        models = {id(host): parameter for parameter, host in self.masters}
        return {
            models.get(id(p), p): state for part in self.parts for p, state in part.state.items()
        }

    def step(self) -> None:
        """Update on the host and on the device."""
        self.library.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients on the device."""
        self.library.zero_grad(set_to_none=set_to_none)


def _library() -> Any:
    """Return torchao's module, loaded for this run alone, on top of a torch that has streams."""
    spec = importlib.util.find_spec("torchao.optim.cpu_offload")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["torch"] = _Torch()
    vars(module)["get_available_devices"] = lambda: ["cpu", "cuda"]
    return module


class _Torch:
    """torch, but for streams, and for tensors in pinned memory."""

    def __init__(self) -> None:
        self.cuda = types.SimpleNamespace(
            Stream=mock.MagicMock, current_stream=mock.MagicMock, stream=contextlib.nullcontext
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty_like(tensor: Any, *, pin_memory: bool, device: str = "cpu") -> Any:
        return torch.empty_like(tensor.detach())


def _without_streams(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return torchao's hook; telling the allocator of a stream moves no allocated byte."""

    def run(parameter: Any) -> None:
        with mock.patch.object(torch.Tensor, "record_stream", return_value=None):
            hook(parameter)

    return run
