"""Which of our quantities each published meter is compared with; different ones are never mixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from benchmarks.accuracy.published import Row
from estimator.record import Meter as Meter
from estimator.result import Peak, Range
from estimator.units import GiB, MiB

METER_ORDER: Final[tuple[Meter, ...]] = ("allocated", "reserved", "device-used")

# The beginning of a row's `metric`, and the quantity that it reads.
METERS: Final[dict[str, Meter]] = {
    "max_memory_allocated": "allocated",
    "max_memory_reserved": "reserved",
    # torchtune's README says of the same table, at commit 5cbc1967b: max_memory_reserved.
    "peak_memory (torchtune memory_stats": "reserved",
    "nvidia-smi": "device-used",
    "nvml used": "device-used",
    "mem_get_info_device_used": "device-used",
}

# Other meters of the same run: the key in `alt_metrics`, the quantity, the bytes of its unit.
ALTERNATIVES: Final[dict[str, tuple[Meter, int]]] = {
    "nvidia_smi_mib": ("device-used", MiB),
    "reserved_gib": ("reserved", GiB),
    "peak_reserved_gb": ("reserved", 10**9),
}


def meter_of(metric: str) -> Meter | None:
    """Return the quantity that a published metric reads, or None where its source does not say."""
    return next((meter for key, meter in METERS.items() if metric.startswith(key)), None)


def readings(row: Row) -> Iterator[tuple[Meter, float]]:
    """Yield each meter of a run with what it read [bytes]."""
    meter = meter_of(row.metric)
    if meter is not None and row.value_gib is not None:
        yield meter, row.value_gib * GiB
    for key, value in (row.alt_metrics or {}).items():
        if key in ALTERNATIVES:
            other, unit = ALTERNATIVES[key]
            yield other, value * unit


def estimated(peak: Peak, meter: Meter) -> Range:
    """Return our range of a meter [bytes]."""
    quantities = {
        "allocated": peak.allocated_bytes,
        "reserved": peak.reserved_bytes,
        "device-used": peak.device_used_bytes,
    }
    return quantities[meter]
