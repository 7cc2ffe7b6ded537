"""Optimizers of small libraries, as far as their steps need a hand on fake tensors."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Final
from unittest import mock

Group = dict[str, Any]

_KERNELS: Final = ("_stableadamw_exp_avg_kernel", "_stableadamw_update_kernel")


class _Launched:
    """A Triton kernel that is launched over a grid, and allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda **_: None


def stable_adamw(library: Any, groups: list[Group], rate: float, implementation: str) -> Any:
    """Return StableAdamW of torch-optimi; its Triton kernels work in place on what there is.

    Source: torch-optimi, stableadamw.py, _triton_stableadamw: the host code around the kernels.
    """
    # The package has a function of the same name.
    module = importlib.import_module("optimi.stableadamw")

    class Launching(library.StableAdamW):  # type: ignore[misc]  # it is not typed here
        def step(self, closure: Any = None, param: Any = None) -> Any:
            with contextlib.ExitStack() as stack:
                for name in _KERNELS:
                    stack.enter_context(mock.patch.object(module, name, _Launched(), create=True))
                return super().step(closure, param)

    return Launching(
        groups, lr=rate, foreach=implementation == "foreach", triton=implementation == "fused"
    )


def grokadamw(library: Any, groups: list[Group], rate: float) -> Any:
    """Return GrokAdamW, whose states lie in host memory and are copied to the device and back."""

    class Copying(library.GrokAdamW):  # type: ignore[misc]  # it is not typed here
        def step(self, closure: Any = None) -> Any:
            with _copies_between_devices():
                return super().step(closure)

    return Copying(groups, lr=rate)


@contextlib.contextmanager
def _copies_between_devices() -> Iterator[None]:
    """Let `.to("cpu")` copy to the host, and `.to(parameter.device)` to the device."""
    import torch

    from profiler.checkpointing import TO_DEVICE, TO_HOST

    def to(tensor: Any, where: Any) -> Any:
        return TO_HOST(tensor) if where == "cpu" else TO_DEVICE(tensor)

    with mock.patch.object(torch.Tensor, "to", to):
        yield
