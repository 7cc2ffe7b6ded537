"""Where a probe does its few operators: on the GPU, or on fake tensors under CUDA semantics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from estimator.calibration import DeviceConstants
from estimator.memory.caching_allocator import CachingAllocator


class Bench(Protocol):
    """Memory that is allocated while a probe works [bytes].

    Args:
        device: as torch knows it.
        fake: whether tensors have no values.
    """

    @property
    def device(self) -> str: ...
    @property
    def fake(self) -> bool: ...

    def allocated(self) -> int:
        """Return what is allocated now, in whole blocks."""

    def reset_peak(self) -> None:
        """Let the peak start again from what is allocated now."""

    def peak(self) -> int:
        """Return the most that was allocated since the reset."""


class OnGpu:
    """The GPU itself, by torch's counters."""

    device = "cuda"
    fake = False

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def allocated(self) -> int:
        """Return `memory_allocated`."""
        return int(self._cuda.memory_allocated())

    def reset_peak(self) -> None:
        """Call `reset_peak_memory_stats`."""
        self._cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Return `max_memory_allocated`."""
        return int(self._cuda.max_memory_allocated())


class OnFakeTensors:
    """What the dry run knows of a GPU: the meter's trace so far, replayed.

    Args:
        meter: sees every operator.
    """

    device = "cpu"
    fake = True

    def __init__(self, meter: Any) -> None:
        self._meter = meter
        self._from = 0

    def _levels(self) -> list[int]:
        recorded = self._meter.recorded()
        allocator, levels = CachingAllocator(), [0]
        for event in recorded.events:
            if event.is_alloc:
                allocator.malloc(event.storage, recorded.storages[event.storage].bytes)
            else:
                allocator.free(event.storage)
            levels.append(allocator.allocated_bytes)
        return levels

    def allocated(self) -> int:
        """Return what the replayed allocator has handed out."""
        return self._levels()[-1]

    def reset_peak(self) -> None:
        """Remember how much of the trace is over."""
        self._from = len(self._levels()) - 1

    def peak(self) -> int:
        """Return the highest level of the replay since then."""
        return max(self._levels()[self._from :])


@contextlib.contextmanager
def on_fake_tensors(
    capability: tuple[int, int], multiprocessors: int, constants: DeviceConstants
) -> Iterator[OnFakeTensors]:
    """Open fake tensors, CUDA's semantics and a meter over them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from profiler import quantized
    from profiler.cuda_semantics import cuda_semantics
    from profiler.instrument import Meter
    from profiler.workspaces import Workspaces

    meter = Meter(workspaces=Workspaces(capability, multiprocessors, constants.cublas_workspace))
    with (
        quantized.quiet_imports(),
        FakeTensorMode(),
        cuda_semantics(capability),
        quantized.on_cuda(),
        meter,
    ):
        yield OnFakeTensors(meter)
