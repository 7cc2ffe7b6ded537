"""The GPU in this machine, as its driver describes it (extra `[nvml]`, or nvidia-smi)."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any, Final

from msgspec import Struct

from estimator.errors import NoDriverError
from estimator.units import Bytes, MiB

TIMEOUT_SECONDS: Final = 10.0

_FIELDS: Final = "name,memory.total,memory.free,memory.used,driver_version"


class LiveGpu(Struct, frozen=True):
    """One GPU now.

    Args:
        name: as the driver prints it; `find_gpu` understands it.
        total_bytes: the driver's total [bytes]. torch's `total_memory` on Linux, which is what a
            process can allocate, is smaller by what the driver keeps: prefer `Gpu.usable_bytes`
            of the catalogue where it is known.
        free_bytes: what nobody uses at this moment [bytes].
        used_by_others_bytes: what running processes use at this moment [bytes].
        driver: the driver's version.
    """

    name: str
    total_bytes: Bytes
    free_bytes: Bytes
    used_by_others_bytes: Bytes
    driver: str


def probe(index: int = 0) -> LiveGpu:
    """Ask the driver about one GPU: through NVML, and where that is missing through nvidia-smi.

    Raises:
        NoDriverError: there is no NVIDIA driver, or no GPU with this index.
    """
    gpu = _from_nvml(index) or _from_nvidia_smi(index)
    if gpu is None:
        raise NoDriverError(
            f"no NVIDIA driver answered for GPU {index} of this machine; "
            "name a card with --gpu NAME (`estimate gpus` lists them)"
        )
    return gpu


def _from_nvml(index: int) -> LiveGpu | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = _memory(pynvml, handle)
        return LiveGpu(
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            total_bytes=Bytes(memory.total),
            free_bytes=Bytes(memory.free),
            used_by_others_bytes=Bytes(memory.used),
            driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _memory(pynvml: Any, handle: Any) -> Any:
    """Return NVML's memory figures, in version 2 where the driver has it.

    Version 1 counts the driver's own reserve as used; version 2, like nvidia-smi, does not.
    """
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _from_nvidia_smi(index: int) -> LiveGpu | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603 - a fixed command line, found on PATH, no shell
            [program, f"--id={index}", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return _from_csv(answer)


def _from_csv(answer: str) -> LiveGpu | None:
    """Read one line of nvidia-smi, sizes in MiB; None where it gives no sizes (`[N/A]`)."""
    cells = [cell.strip() for cell in answer.strip().split("\n")[0].split(",")]
    if len(cells) != len(_FIELDS.split(",")) or not all(cell.isdecimal() for cell in cells[1:4]):
        return None
    total, free, used = (Bytes(int(cell) * MiB) for cell in cells[1:4])
    return LiveGpu(cells[0], total, free, used, driver=cells[4])
