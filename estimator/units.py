"""Bytes: the one unit inside, and how people write and read it."""

from __future__ import annotations

import re
from typing import Final, NewType

Bytes = NewType("Bytes", int)

KiB: Final = 1024
MiB: Final = 1024**2
GiB: Final = 1024**3
GB: Final = 10**9

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": 1024**4,
    "kb": 10**3,
    "mb": 10**6,
    "gb": GB,
    "tb": 10**12,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> Bytes:
    """Bytes that a person's size means: `24GiB`, `24 GB`, `1536MiB` or a plain count of bytes.

    Raises:
        ValueError: the text is not a number with one of the known units.

    Example:
        >>> parse_size("24GiB")
        25769803776
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        known = "B, KiB, MiB, GiB, TiB, kB, MB, GB, TB"
        raise ValueError(f"cannot read {text!r} as a size; write a number and a unit of {known}")
    return Bytes(round(float(match[1]) * _UNITS[match[2].lower()]))


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`.

    Example:
        >>> round_up(513, 512)
        1024
    """
    return -(-value // multiple) * multiple


def ceil_div(value: int, divisor: int) -> int:
    """Divide and round up.

    Example:
        >>> ceil_div(13, 4)
        4
    """
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """Return the smallest power of two that is not below `value`.

    Example:
        >>> next_power_of_2(135), next_power_of_2(256)
        (256, 256)
    """
    return 1 << (value - 1).bit_length()


def gib(value: int) -> str:
    """Write bytes as people read them: GiB, two decimals.

    Example:
        >>> gib(16_060_522_496)
        '14.96 GiB'
    """
    return f"{value / GiB:,.2f} GiB"


def printed(value: int) -> str:
    """Write bytes as torch prints them: MiB below 1 GiB, so that a single tensor can be told.

    Example:
        >>> printed(112 * 2**20), printed(3 * 2**30)
        ('112.00 MiB', '3.00 GiB')
    """
    return gib(value) if abs(value) >= GiB else f"{value / MiB:,.2f} MiB"
