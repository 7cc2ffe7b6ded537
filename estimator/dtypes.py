"""Element types: one row each, with the bytes of one element as torch stores it."""

from __future__ import annotations

from enum import Enum


class DType(Enum):
    """An element type and its width [bytes]; the value is torch's own name for it."""

    FLOAT32 = ("float32", 4)
    BFLOAT16 = ("bfloat16", 2)
    FLOAT16 = ("float16", 2)
    INT64 = ("int64", 8)
    INT32 = ("int32", 4)
    INT8 = ("int8", 1)
    UINT8 = ("uint8", 1)
    BOOL = ("bool", 1)
    FLOAT8_E4M3 = ("float8_e4m3fn", 1)
    FLOAT8_E5M2 = ("float8_e5m2", 1)

    # Members are single objects; Enum would hash the name in Python at every look-up.
    __hash__ = object.__hash__

    def __init__(self, label: str, width: int) -> None:
        self.label = label
        self.width = width

    @property
    def is_half(self) -> bool:
        """Whether this is one of the 16-bit floating point types."""
        return self in (DType.BFLOAT16, DType.FLOAT16)


def promote(left: DType, right: DType) -> DType:
    """Return the type of an elementwise result of two floating point tensors, as torch promotes."""
    if left is right:
        return left
    return DType.FLOAT32
