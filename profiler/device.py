"""What a measurement asks of a device: a GPU that is read, or one that is only simulated.

Nothing here imports torch before it is asked to, and nothing touches the GPU before `open`.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from estimator.calibration import device_constants
from estimator.catalog import Gpu, find_gpu
from estimator.errors import (
    CannotEstimateError,
    InvalidRequestError,
    MissingDependencyError,
    NoDriverError,
    UnknownGpuError,
)
from estimator.memory.caching_allocator import CachingAllocator, OutOfMemory
from estimator.nvml import LiveGpu, probe
from estimator.record import Environment, Meters, Origin
from estimator.request import EstimateRequest
from profiler import engine, real_run
from profiler.bench import Bench, OnGpu, on_fake_tensors
from profiler.gauge import Gauge
from profiler.trace import LOAD
from profiler.versions import allocator_settings, imported_versions, python_version
from profiler.whole_file import write_whole

# How torch, cuBLAS and cuDNN say that there is no memory left, besides torch's own exception.
_OUT_OF_MEMORY: Final = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Device(Protocol):
    """One device for one process.

    Args:
        origin: of the records that it gives.
        idle_bytes: device memory in use by the process before its first tensor; None if not known.
    """

    @property
    def origin(self) -> Origin: ...
    @property
    def idle_bytes(self) -> int | None: ...

    def check(self) -> None:
        """Refuse where there is no such device, without touching it."""

    def prepared(
        self, request: EstimateRequest, config: dict[str, Any]
    ) -> contextlib.AbstractContextManager[real_run.Train]:
        """Do everything that needs no device, and give what trains on it."""

    def open(self, limit_bytes: int | None) -> None:
        """Begin to use the device, of which the allocator may hold so much."""

    def meters(self) -> Meters:
        """Return the highest values since the peaks were reset."""

    def reset_peaks(self) -> None:
        """Let the peaks start again from the present values."""

    def ran_out(self, error: Exception) -> bool:
        """Whether an error means that there was no memory left."""

    def record_history(self) -> None:
        """Record from here on what the allocator does."""

    def write_history(self, path: Path) -> None:
        """Write what was recorded: torch's snapshot, pickled and compressed."""

    def bench(self) -> contextlib.AbstractContextManager[Bench]:
        """Return where a probe does its operators."""

    def environment(self) -> Environment:
        """Return what the device is and which software ran."""


class Cuda:
    """The first GPU that this process sees, through torch.

    Device memory that others hold is read from the driver before this process has a context of its
    own; where that cannot be read, nothing is said of device memory in use.
    """

    name: Final = "cuda"
    origin: Final[Origin] = "measured"

    def __init__(self) -> None:
        self.idle_bytes: int | None = None
        self._others: int | None = None
        self._driver: str | None = None
        self._opened = False

    @property
    def _cuda(self) -> Any:
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                "a measurement needs 'torch'; install the build for your CUDA"
            ) from error
        return torch.cuda

    def check(self) -> None:
        """Refuse a machine without a GPU; counting devices makes no context."""
        if not self._cuda.is_available():
            raise CannotEstimateError(
                "torch finds no CUDA device on this machine; run this on one that has a GPU, or "
                "add --device simulated to try it without one"
            )

    def prepared(
        self, request: EstimateRequest, config: dict[str, Any]
    ) -> contextlib.AbstractContextManager[real_run.Train]:
        """Build the model on the meta device."""
        return real_run.prepared(request, config, self)

    def open(self, limit_bytes: int | None) -> None:
        """Make the context and read what it takes, then limit the allocator.

        Raises:
            InvalidRequestError: the limit is above what the device has.
        """
        import torch

        cuda = self._cuda
        live, is_first = _live_gpu(), not _has_context()
        if live is not None:
            self._driver = live.driver
            self._others = live.used_by_others_bytes if is_first else None
        cuda.init()
        torch.ones(1, device=self.name).add_(1)
        cuda.synchronize()
        cuda.empty_cache()
        self._opened = True
        self.idle_bytes = self._used()
        if self.idle_bytes is not None and self.idle_bytes < 0:
            # The driver counts otherwise than the runtime; then neither is to be trusted.
            self.idle_bytes = self._others = None
        _, total = cuda.mem_get_info()
        if limit_bytes is not None:
            if not 0 < limit_bytes <= total:
                raise InvalidRequestError(
                    f"--memory-limit {limit_bytes} is not between 1 and the {total} bytes of the "
                    "device"
                )
            # torch cuts the product of fraction and total to whole bytes.
            cuda.set_per_process_memory_fraction(min(1.0, (limit_bytes + 0.5) / total))
        self.reset_peaks()

    def _used(self) -> int | None:
        """Return the device memory in use now, less what others used before us [bytes]."""
        if self._others is None:
            return None
        free, total = self._cuda.mem_get_info()
        return int(total - free - self._others)

    def meters(self) -> Meters:
        """Read torch's peaks, and the device memory in use at this moment."""
        stats = self._cuda.memory_stats()
        return Meters(
            allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
            requested_bytes=stats.get("requested_bytes.all.peak"),
            reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
            device_used_bytes=self._used(),
        )

    def reset_peaks(self) -> None:
        """Let torch's peaks start again from the present values."""
        self._cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Wait for all kernels."""
        self._cuda.synchronize()

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the GPU."""
        major, minor = self._cuda.get_device_capability()
        return int(major), int(minor)

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors of the GPU."""
        return int(self._cuda.get_device_properties(0).multi_processor_count)

    def ran_out(self, error: Exception) -> bool:
        """Whether torch, cuBLAS or cuDNN found no memory."""
        return ran_out(error)

    def record_history(self) -> None:
        """Record every allocation, without the stack of calls that led to it."""
        self._cuda.memory._record_memory_history(context=None)

    def write_history(self, path: Path) -> None:
        """Write `torch.cuda.memory._snapshot()` in one go, pickled and compressed."""
        content = gzip.compress(pickle.dumps(self._cuda.memory._snapshot()), mtime=0)
        write_whole(path, content)

    def bench(self) -> contextlib.AbstractContextManager[Bench]:
        """Return torch's counters."""
        return contextlib.nullcontext(OnGpu(self._cuda))

    def environment(self) -> Environment:
        """Ask torch and the driver; before `open`, only what needs no context."""
        import torch

        facts: dict[str, Any] = {}
        if self._opened:
            name = str(self._cuda.get_device_name())
            major, minor = self.capability
            facts = {
                "gpu": name,
                "gpu_id": catalogue_id(name),
                "compute_capability": f"{major}.{minor}",
                "multiprocessors": self.multiprocessors,
                "total_bytes": int(self._cuda.mem_get_info()[1]),
            }
        return Environment(
            **facts,
            driver=self._driver,
            cuda=torch.version.cuda,
            python=python_version(),
            versions=imported_versions(),
            allocator=allocator_settings(),
        )


class Simulated:
    """A GPU that is not there: the dry run's trace, replayed through a model of the allocator.

    What its counters say is the dry run's prediction, never a measurement.

    Args:
        gpu: of the catalogue; None simulates a device without a name or a size.
    """

    origin: Final[Origin] = "simulated"

    def __init__(self, gpu: Gpu | None) -> None:
        self.gpu = gpu
        self.constants = device_constants(gpu.compute_capability if gpu is not None else "")
        self.idle_bytes: int | None = None
        self._allocator = CachingAllocator()
        self._managed = 0

    def check(self) -> None:
        """Find nothing missing: there is no device."""

    @contextlib.contextmanager
    def prepared(
        self, request: EstimateRequest, config: dict[str, Any]
    ) -> Iterator[real_run.Train]:
        """Trace two steps on fake tensors.

        Raises:
            EstimatorError: the run is not supported, or the real stack refuses it.
        """
        run = engine.run(request, config)
        yield lambda gauge, _: self._replay(run, gauge)

    def _replay(self, run: engine.DryRun, gauge: Gauge) -> None:
        """Hand out and take back what both steps did; a third one does what the second did."""
        self._managed = run.managed_bytes
        allocator, present = self._allocator, LOAD
        for index, event in enumerate(run.trace.events):
            if index == run.trace.steady_from:
                gauge.end_step()
                gauge.begin_step()
                present = LOAD
            if event.phase != present:
                present = event.phase
                gauge.enter(present)
            if event.is_alloc:
                allocator.malloc(event.storage, run.trace.storages[event.storage].bytes)
            else:
                allocator.free(event.storage)
        gauge.end_step()

    def open(self, limit_bytes: int | None) -> None:
        """Give the allocator what the limit and the card leave to it."""
        self.idle_bytes = self.constants.context.expected
        usable = self.gpu.usable_bytes if self.gpu is not None else None
        room = None if usable is None else usable - self.idle_bytes
        capacity = min((each for each in (room, limit_bytes) if each is not None), default=None)
        self._allocator = CachingAllocator(capacity)

    def meters(self) -> Meters:
        """Read the allocator; device memory is what it holds, with the constants of the card."""
        stats = self._allocator.stats
        context = self.constants.context.expected
        return Meters(
            allocated_bytes=stats.peak_allocated_bytes,
            requested_bytes=stats.peak_requested_bytes,
            reserved_bytes=stats.peak_reserved_bytes,
            device_used_bytes=stats.peak_reserved_bytes + context + self._managed,
        )

    def reset_peaks(self) -> None:
        """Let the allocator's peaks start again from the present values."""
        self._allocator.reset_peaks()

    def ran_out(self, error: Exception) -> bool:
        """Whether the allocator was refused memory."""
        return isinstance(error, OutOfMemory)

    def record_history(self) -> None:
        """Refuse: there is no snapshot of an allocator that is not torch's.

        Raises:
            InvalidRequestError: always.
        """
        raise InvalidRequestError(
            "--snapshot is torch's own history, which a simulated device has none of; "
            "`estimate dry-run --trace FILE.pickle` writes the one that was predicted"
        )

    def write_history(self, path: Path) -> None:
        """Write nothing: nothing was recorded."""

    def bench(self) -> contextlib.AbstractContextManager[Bench]:
        """Return fake tensors under the semantics of this card, or of an A100."""
        gpu = self.gpu
        major, _, minor = (gpu.compute_capability if gpu is not None else "").partition(".")
        capability = (int(major), int(minor)) if major.isdigit() else (8, 0)
        count = gpu.multiprocessors if gpu is not None else None
        return on_fake_tensors(capability, count or 108, self.constants)

    def environment(self) -> Environment:
        """Return what is simulated, and the software that was run on fake tensors."""
        gpu = self.gpu
        return Environment(
            gpu=f"simulated {gpu.name if gpu is not None else 'GPU'}",
            gpu_id=gpu.key if gpu is not None else None,
            compute_capability=gpu.compute_capability if gpu is not None else None,
            multiprocessors=gpu.multiprocessors if gpu is not None else None,
            total_bytes=gpu.usable_bytes if gpu is not None else None,
            python=python_version(),
            versions=imported_versions(),
        )


def ran_out(error: Exception) -> bool:
    """Whether an error of torch's means that there was no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _OUT_OF_MEMORY)


def _live_gpu() -> LiveGpu | None:
    """Ask the driver about the first GPU that this process sees; None where it does not answer."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if not chosen.isdigit():
        return None
    try:
        return probe(int(chosen))
    except NoDriverError:
        return None


def _has_context() -> bool:
    """Whether this process uses the GPU already, without beginning to."""
    import torch

    asked: Callable[[int], bool] | None = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return asked is not None and bool(asked(0))


def catalogue_id(name: str) -> str | None:
    """Return the catalogue's id of a card, by the name that its driver gives."""
    try:
        return find_gpu(name).key
    except UnknownGpuError:
        return None
