"""What the caching allocator charges for one tensor: the size of the block that it hands out."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from estimator.units import MiB, round_up

SMALLEST_BLOCK: Final = 512
LARGEST_SMALL: Final = MiB
PACKED_SEGMENT: Final = 20 * MiB
LARGEST_PACKED: Final = 10 * MiB
SEGMENT_STEP: Final = 2 * MiB
LARGEST_TAIL: Final = MiB


@lru_cache(maxsize=65536)
def charge(size_bytes: int) -> int:
    """Bytes of the block that a tensor of this size gets when blocks of its size are reused.

    A request is rounded up to 512 bytes. In the large pool a block is not split when 1 MiB or less
    would be left of it: a tensor with a segment of its own is charged the whole segment then, and
    of the tensors that share a 20 MiB segment the last is charged the tail, here its average.

    Valid for: the default allocator; with expandable segments only the rounding to 512 remains.
    Source: torch-allocator, round_size, get_allocation_size and should_split.

    Example:
        >>> charge(43 * MiB) // MiB
        44
    """
    if size_bytes == 0:
        return 0
    block = round_up(size_bytes, SMALLEST_BLOCK)
    if block <= LARGEST_SMALL:
        return block
    if block < LARGEST_PACKED:
        shared = PACKED_SEGMENT // block
        tail = PACKED_SEGMENT - shared * block
        return block + (tail // shared if tail <= LARGEST_TAIL else 0)
    segment = round_up(block, SEGMENT_STEP)
    return segment if segment - block <= LARGEST_TAIL else block
