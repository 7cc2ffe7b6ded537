"""The device of a live run: what is free, what the process holds, the peaks of torch's counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from estimator.memory.allocator import charge
from estimator.record import Environment, Meters, Origin
from estimator.units import gib
from profiler.device import catalogue_id
from profiler.versions import allocator_settings, imported_versions, python_version


class Look(NamedTuple):
    """What the driver and torch say at one moment [bytes].

    Args:
        name: of the device, as the driver prints it.
        total: what the driver offers.
        free: what nobody uses.
        allocated, reserved: by this process, as torch counts.
        context: the CUDA context of this process; None where nobody tells it from other processes.
        limit: what this process may reserve at most, where it has limited itself.
    """

    name: str
    total: int
    free: int
    allocated: int
    reserved: int
    context: int | None = None
    limit: int | None = None


class Meter(Protocol):
    """What the callback reads a device by; a test puts its own in place."""

    @property
    def origin(self) -> Origin:
        """`measured` for a real device, `simulated` for anything else."""

    def look(self) -> Look:
        """Return what is free and what is held now."""

    def peak(self) -> Meters:
        """Return the highest values since the last reset."""

    def reset(self) -> None:
        """Begin to look for the highest values anew."""

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""

    def environment(self) -> Environment:
        """Describe the device and the software."""


class CudaMeter:
    """torch.cuda's counters for one device."""

    def __init__(self, device: Any) -> None:
        self._device = device

    @property
    def origin(self) -> Origin:
        """A real device is read."""
        return "measured"

    def look(self) -> Look:
        """Return what is free and what is held now."""
        from torch import cuda

        free, total = cuda.mem_get_info(self._device)
        reserved = cuda.memory_reserved(self._device)
        fraction = self._fraction()
        return Look(
            name=cuda.get_device_name(self._device),
            total=total,
            free=free,
            allocated=cuda.memory_allocated(self._device),
            reserved=reserved,
            context=self._context(total - free - reserved),
            limit=None if fraction >= 1 else int(fraction * total),
        )

    def peak(self) -> Meters:
        """Return the highest values since the last reset."""
        from torch import cuda

        return Meters(
            allocated_bytes=cuda.max_memory_allocated(self._device),
            requested_bytes=cuda.memory_stats(self._device).get("requested_bytes.all.peak"),
            reserved_bytes=cuda.max_memory_reserved(self._device),
        )

    def reset(self) -> None:
        """Begin to look for the highest values anew."""
        from torch import cuda

        cuda.reset_peak_memory_stats(self._device)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        from torch import cuda

        cuda.synchronize(self._device)

    def environment(self) -> Environment:
        """Describe the device and the software."""
        from torch import cuda, version

        properties = cuda.get_device_properties(self._device)
        return Environment(
            gpu=properties.name,
            gpu_id=catalogue_id(properties.name),
            compute_capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            total_bytes=cuda.mem_get_info(self._device)[1],
            cuda=version.cuda,
            python=python_version(),
            versions=imported_versions(),
            allocator=allocator_settings(),
        )

    def _fraction(self) -> float:
        """Return what share of the device this process has left itself; torch 2.6 does not say."""
        from torch import cuda

        read = getattr(cuda, "get_per_process_memory_fraction", None)
        return float(read(self._device)) if read is not None else 1.0

    def _context(self, outside: int) -> int | None:
        """Return the context's size, where NVML says that no other process is on the device.

        Args:
            outside: what is in use beside torch's reserve, by whomever [bytes].
        """
        from torch import cuda

        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:
            return None
        try:
            uuid = f"GPU-{cuda.get_device_properties(self._device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            computing = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            drawing = pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
            return outside if len(computing) == 1 and not drawing else None
        except Exception:
            # A driver that does not tell is no reason to stop anything.
            return None
        finally:
            pynvml.nvmlShutdown()


def meter_of(model: Any) -> Meter | None:
    """Return the meter of the device that a model is on; None where it is no CUDA device."""
    device = next(model.parameters()).device
    return CudaMeter(device) if device.type == "cuda" else None


def capacity(look: Look, context: int) -> tuple[int, str]:
    """Return what this process can hold on the device, and how that was found out [bytes].

    Everything that it holds already counts as its own: tensors, cached blocks, the CUDA context.

    Args:
        context: what the context is taken to be, where nobody tells it from other processes.
    """
    outside = max(0, look.total - look.free - look.reserved)
    own = min(outside, look.context if look.context is not None else context)
    room = look.free + look.reserved
    if look.limit is not None:
        room = min(room, look.limit)
    how = "is" if look.context is not None else "is taken to be"
    limit = "" if look.limit is None else f", which limits itself to {gib(look.limit)}"
    return max(1, room + own), (
        f"{gib(look.free)} of the device are free, {gib(look.reserved)} reserved by this "
        f"process{limit}, and its CUDA context {how} {gib(own)}"
    )


def unknown_tensors(look: Look, known: Iterable[Any], device: Any) -> int:
    """Return what this process has allocated beside the tensors of the run [bytes].

    Args:
        known: the tensors of the model and of its optimizer.
        device: the one that was looked at.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): charge(tensor.untyped_storage().nbytes())
        for tensor in known
        if tensor.device == device
    }
    return max(0, look.allocated - sum(storages.values()))
