"""Out-of-memory messages and nvidia-smi tables, as people paste them, read into numbers.

torch has worded its message in several ways; the sentence around a number says which number it is,
so each is looked for by itself, and what a version did not print is None. Sizes are printed with
two decimals, so that each is a range of bytes.

Source: torch-caching-allocator, DeviceCachingAllocator::malloc, format_size and
reportProcessMemoryInfo; the wordings before it were read in forks of 2018 to 2022.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import InvalidRequestError
from estimator.result import Range
from estimator.units import GiB, KiB, MiB

MAX_MESSAGE_CHARACTERS: Final = 200_000

Speaker = Literal[
    "torch", "bitsandbytes", "cuBLAS", "cuDNN", "NCCL", "the CUDA runtime", "nvidia-smi"
]


class OomMessage(Struct, frozen=True):
    """What a message says; None is what it does not say. Sizes are ranges as printed [bytes].

    Args:
        speaker: who wrote it.
        device: the number of the GPU.
        tried_bytes: what was asked of the driver: a segment, where torch says it.
        total_bytes: what the driver has on the card.
        allowed_bytes: what `set_per_process_memory_fraction` leaves of it.
        free_bytes: what the driver had left.
        used_bytes: what nvidia-smi shows as used on the whole card.
        process_bytes: what this process holds on the card, context included.
        others_bytes: what the other processes that are named hold.
        allocated_bytes: blocks handed out; blocks kept by CUDA graphs count here.
        reserved_bytes: segments that the allocator holds.
        graph_bytes: what is kept in the private pools of CUDA graphs.
    """

    speaker: Speaker
    device: int | None = None
    tried_bytes: Range | None = None
    total_bytes: Range | None = None
    allowed_bytes: Range | None = None
    free_bytes: Range | None = None
    used_bytes: Range | None = None
    process_bytes: Range | None = None
    others_bytes: Range | None = None
    allocated_bytes: Range | None = None
    reserved_bytes: Range | None = None
    graph_bytes: Range | None = None

    @property
    def unallocated_bytes(self) -> int | None:
        """Bytes that the allocator holds and could not use for the request."""
        if self.reserved_bytes is None or self.allocated_bytes is None:
            return None
        return max(0, self.reserved_bytes.expected - self.allocated_bytes.expected)


def parse_message(text: str) -> OomMessage:
    """Read a pasted message; of several the first is read.

    Raises:
        InvalidRequestError: the text is too long, or holds no message that is known.

    Example:
        >>> parse_message("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.93 GiB total "
        ...               "capacity; 6.81 GiB already allocated)").tried_bytes.expected
        20971520
    """
    if len(text) > MAX_MESSAGE_CHARACTERS:
        raise InvalidRequestError(
            f"the message is longer than {MAX_MESSAGE_CHARACTERS} characters; paste the lines "
            "around 'out of memory' only"
        )
    plain = _plain(text)
    for read in (_torch, _bitsandbytes, _nccl, _libraries, _table, _runtime):
        found = read(plain)
        if found is not None:
            return found
    raise InvalidRequestError(
        "the text holds no out-of-memory message that is known here; paste the line that begins "
        "with 'CUDA out of memory', with all of its numbers, or the table of nvidia-smi"
    )


# -- torch -------------------------------------------------------------------------------------

# Bounded, so that a text of digits alone takes no longer than another.
_SIZE: Final = r"(\d{1,15}(?:\.\d{1,4})?) ?(bytes|KiB|MiB|GiB)"
_UNITS: Final[dict[str, int]] = {"bytes": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB}
_OPENING: Final = re.compile(rf"(?:CUDA|HIP) out of memory\. Tried to allocate {_SIZE}")
# Of older torch behind the opening, in brackets; of newer torch as sentences.
_AFTER: Final = 1_500
_DEVICE: Final = re.compile(r"\bGPU (\d{1,4})\b")
_WORDINGS: Final[dict[str, re.Pattern[str]]] = {
    "total_bytes": re.compile(rf"{_SIZE} total capacity|has a total capaci?ty of {_SIZE}"),
    "free_bytes": re.compile(rf"{_SIZE} free;|of which ?{_SIZE} is free"),
    "allowed_bytes": re.compile(rf"{_SIZE} allowed;"),
    "allocated_bytes": re.compile(
        rf"{_SIZE} already allocated|allocated memory {_SIZE} is allocated by PyTorch"
    ),
    "reserved_bytes": re.compile(rf"{_SIZE} reserved in total by PyTorch"),
    "cached": re.compile(rf"{_SIZE} cached"),
    "unallocated": re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated"),
    "graph_bytes": re.compile(rf"with {_SIZE} allocated in private pools"),
    "process_bytes": re.compile(rf"this process has {_SIZE} memory in use"),
}
_PROCESS: Final = re.compile(rf"Process \d+ has {_SIZE} memory in use")
# torch also warns, with whole numbers.
_EXACT: Final = re.compile(
    r"memory allocation failed with OOM on device (\d{1,4}) while trying to allocate "
    r"(\d{1,15}) bytes \(free: (\d{1,15}), total: (\d{1,15})\)"
)


def _torch(text: str) -> OomMessage | None:
    opening = _OPENING.search(text)
    if opening is None:
        return _warning(text)
    rest = text[opening.end() : opening.end() + _AFTER]
    again = _OPENING.search(rest)
    if again is not None:
        rest = rest[: again.start()]
    said = {name: _first(pattern, rest) for name, pattern in _WORDINGS.items()}
    kept = said.pop("cached"), said.pop("unallocated")
    held = next((each for each in kept if each is not None), None)
    if said["reserved_bytes"] is None and held is not None and said["allocated_bytes"] is not None:
        said["reserved_bytes"] = _sum(said["allocated_bytes"], held)
    device = _DEVICE.search(rest)
    message = OomMessage(
        speaker="torch",
        device=int(device[1]) if device else None,
        tried_bytes=_printed(*opening.groups()),
        **said,
    )
    return _with_processes(message, [_printed(*each) for each in _PROCESS.findall(rest)])


def _with_processes(message: OomMessage, named: list[Range]) -> OomMessage:
    """Tell this process from the others.

    In a container torch does not find itself among the process numbers: then this process is the
    one that holds the least of those that hold what the allocator does. A size beyond the card, or
    none at all, is what the driver gives where it does not know.
    """
    total = message.total_bytes.expected if message.total_bytes else None
    own = message.process_bytes
    if own is not None and (own.expected == 0 or (total is not None and own.low > total)):
        own = None
    others = list(named)
    reserved = message.reserved_bytes
    if own is None and reserved is not None:
        holding = [each for each in others if each.high >= reserved.low]
        own = min(holding, key=lambda each: each.expected, default=None)
        if own is not None:
            others.remove(own)
    summed = None
    for each in others:
        summed = each if summed is None else _sum(summed, each)
    return replace(message, process_bytes=own, others_bytes=summed)


def _warning(text: str) -> OomMessage | None:
    found = _EXACT.search(text)
    if found is None:
        return None
    device, tried, free, total = (int(each) for each in found.groups())
    return OomMessage(
        "torch",
        device=device,
        tried_bytes=Range(tried, tried, tried),
        free_bytes=Range(free, free, free),
        total_bytes=Range(total, total, total),
    )


# -- other libraries ---------------------------------------------------------------------------

_OPS: Final = re.compile(r"Error out of memory at line \d+ in file \S*?csrc/?\\?\S*")
_NCCL_SIZE: Final = re.compile(r"Failed to CUDA \w+(?: \w+)? (\d{1,15}) bytes")


def _bitsandbytes(text: str) -> OomMessage | None:
    """Return the message of a CUDA call of bitsandbytes, which names no size."""
    return OomMessage("bitsandbytes") if _OPS.search(text) else None


def _nccl(text: str) -> OomMessage | None:
    if not re.search(r"NCCL WARN Cuda failure (?:\d+ )?'out of memory'", text):
        return None
    size = _NCCL_SIZE.search(text)
    tried = int(size[1]) if size else None
    return OomMessage("NCCL", tried_bytes=Range(tried, tried, tried) if tried else None)


def _libraries(text: str) -> OomMessage | None:
    if "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return OomMessage("cuBLAS")
    return OomMessage("cuDNN") if "CUDNN_STATUS_ALLOC_FAILED" in text else None


def _runtime(text: str) -> OomMessage | None:
    known = r"CUDA(?: driver)? error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_ME"
    return OomMessage("the CUDA runtime") if re.search(known, text) else None


# -- nvidia-smi --------------------------------------------------------------------------------

_USAGE: Final = re.compile(r"(\d{1,9}) ?MiB / (\d{1,9}) ?MiB")


def _table(text: str) -> OomMessage | None:
    """Return the usage of the fullest card of an nvidia-smi table; whole MiB are printed."""
    cards = [(int(used), int(total)) for used, total in _USAGE.findall(text)]
    if not cards:
        return None
    number, (used, total) = max(enumerate(cards), key=lambda each: each[1][0])
    return OomMessage(
        "nvidia-smi",
        device=number,
        total_bytes=_mebibytes(total),
        used_bytes=_mebibytes(used),
    )


def _mebibytes(number: int) -> Range:
    return Range(number * MiB - MiB // 2, number * MiB, number * MiB + MiB // 2)


# -- sizes -------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Return the text without colours, frames and line ends, which cut a message into pieces."""
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " ".join(uncoloured.translate(_FRAMES).split())


_FRAMES: Final = str.maketrans(dict.fromkeys("│┃╭╮╰╯─━|", " "))


def _first(pattern: re.Pattern[str], text: str) -> Range | None:
    found = pattern.search(text)
    if found is None:
        return None
    number, unit = (each for each in found.groups() if each is not None)
    return _printed(number, unit)


def _printed(number: str, unit: str) -> Range:
    """Return the bytes that a printed size can stand for.

    Example:
        >>> _printed("2.00", "GiB").expected
        2147483648
    """
    width = _UNITS[unit]
    decimals = len(number.partition(".")[2])
    expected = round(float(number) * width)
    half = 0 if unit == "bytes" else width // (2 * 10**decimals)
    return Range(max(0, expected - half), expected, expected + half)


def _sum(*ranges: Range) -> Range:
    return Range(
        sum(each.low for each in ranges),
        sum(each.expected for each in ranges),
        sum(each.high for each in ranges),
    )
