"""What a pasted out-of-memory message says: why there was no memory, and which tensor asked for it.

The message gives the size that was asked of the driver and what was allocated then. Both are looked
up in the requests of the estimated run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from estimator.memory.caching_allocator import round_size, segment_size
from estimator.memory.requests import Request, Turn
from estimator.oom_message import OomMessage
from estimator.pipeline import device_of, engine_for
from estimator.planner import Question
from estimator.request import EstimateRequest
from estimator.result import Range, Suggestion
from estimator.units import MiB, printed

SHOWN: Final = 5
Cause = Literal["limit", "freed meanwhile", "fragmentation", "others", "shortage", "outside torch"]


class Finding(Struct, frozen=True):
    """One reason why the request failed, and what to do about it.

    Args:
        bytes: the memory that it is about.
    """

    cause: Cause
    bytes: int
    summary: str
    advice: str


class Asker(Struct, frozen=True):
    """A tensor of the estimated run that asks the driver for as much as the message says.

    Args:
        turn, moment: when it asks: loading, the first step or a later one, and where in it.
        size_bytes: the tensor itself; the driver is asked for a whole segment.
        allocated_bytes: what is allocated when it asks, by the estimate.
        off_bytes: how far that is from what the message says; None where it says nothing.
    """

    turn: Turn
    moment: str
    tensor: str
    size_bytes: int
    allocated_bytes: int
    off_bytes: int | None


class Diagnosis(Struct, frozen=True):
    """A message, why it came, who would have asked, and what would help.

    Args:
        least_bytes: what the run needs in tensors at least: allocated and the request itself.
        askers: tensors of the size that was asked for, the nearest in time first.
    """

    message: OomMessage
    findings: tuple[Finding, ...]
    least_bytes: Range | None
    askers: tuple[Asker, ...]
    suggestions: tuple[Suggestion, ...]


def diagnose(
    message: OomMessage, question: Question | None, suggestions: tuple[Suggestion, ...] = ()
) -> Diagnosis:
    """Return what a message says, with the tensors of the request if there is one."""
    askers = tuple(_askers(message, question)) if question is not None else ()
    return Diagnosis(
        message, tuple(_findings(message)), least_bytes(message), askers[:SHOWN], suggestions
    )


def on_the_card(request: EstimateRequest, message: OomMessage | None) -> EstimateRequest:
    """Return the request on the card of the message, where it names none itself."""
    hardware = request.hardware
    if message is None or message.total_bytes is None:
        return request
    if hardware.gpu is not None or hardware.memory_bytes is not None:
        return request
    size = message.total_bytes.expected
    return replace(request, hardware=replace(hardware, memory_bytes=size))


def least_bytes(message: OomMessage) -> Range | None:
    """Return what the tensors needed at least: what was allocated, and what was asked for."""
    allocated, tried = message.allocated_bytes, message.tried_bytes
    if allocated is None or tried is None:
        return None
    return Range(
        allocated.low + tried.low, allocated.expected + tried.expected, allocated.high + tried.high
    )


# -- why ---------------------------------------------------------------------------------------


def _findings(message: OomMessage) -> Iterator[Finding]:
    """Yield what would have been enough alone, or else that the card is too small."""
    if message.speaker not in ("torch", "nvidia-smi"):
        yield _outside(message)
        return
    tried = message.tried_bytes.expected if message.tried_bytes else None
    if tried is None:
        return
    found = [*_limited(message, tried), *_elsewhere(message, tried)]
    least = least_bytes(message)
    if least is not None and (not found or _hardly_fragmented(message, found)):
        found.insert(0, _shortage(least.expected))
    yield from found


def _shortage(least: int) -> Finding:
    return Finding(
        "shortage", least,
        f"the tensors need at least {printed(least)} at this moment, and the card does not have it",
        "make the run smaller: see the suggestions, or ask `estimate` with this card",
    )  # fmt: skip


def _hardly_fragmented(message: OomMessage, found: list[Finding]) -> bool:
    """Whether pieces are all there was, and too few to carry the run much further."""
    reserved = message.reserved_bytes
    only = [each.cause for each in found] == ["fragmentation"]
    return only and reserved is not None and found[0].bytes < _LARGE * reserved.expected


def _limited(message: OomMessage, tried: int) -> Iterator[Finding]:
    allowed, held = message.allowed_bytes, message.reserved_bytes or message.allocated_bytes
    if allowed is not None and held is not None and held.expected + tried > allowed.expected:
        yield Finding(
            "limit", allowed.expected,
            f"the process may hold {printed(allowed.expected)} only, by "
            "set_per_process_memory_fraction",
            "raise the fraction, or ask `estimate` with --memory of that size",
        )  # fmt: skip


def _elsewhere(message: OomMessage, tried: int) -> Iterator[Finding]:
    """Yield where memory was that would have been enough."""
    free = message.free_bytes.expected if message.free_bytes else 0
    if free >= tried + _DRIVERS_OWN and message.allowed_bytes is None:
        yield Finding(
            "freed meanwhile", free,
            f"{printed(free)} were free when the message was written, more than was asked for",
            "another process or thread gave memory back in between, or a limit outside torch "
            "(a container, MIG, WSL) is in force: look who else uses the card",
        )  # fmt: skip
        return
    kept = message.unallocated_bytes
    if kept is not None and kept + free >= tried:
        yield Finding(
            "fragmentation", kept,
            f"the allocator held {printed(kept)} in pieces that no tensor used, and "
            f"{printed(free)} were free: in one piece they would have held the {printed(tried)}",
            "set PYTORCH_ALLOC_CONF=expandable_segments:True (older torch: "
            "PYTORCH_CUDA_ALLOC_CONF), or pad batches to one length",
        )  # fmt: skip
    others = _of_others(message)
    if others is not None and others + free >= tried:
        yield Finding(
            "others", others,
            f"about {printed(others)} of the card are held outside this process",
            "end the other processes (nvidia-smi lists them), or give --reserved-by-others",
        )  # fmt: skip


# Pieces are worth a setting of the allocator from this share of what it holds.
_LARGE: Final = 0.05
# The driver cannot give its last bytes: it maps whole pages, and keeps some for itself.
_DRIVERS_OWN: Final = 256 * MiB
# CUDA context and libraries: what a process holds beside its segments is not called another's.
_CONTEXT: Final = 1024**3


def _of_others(message: OomMessage) -> int | None:
    """Return what others hold, from their own numbers or from what is missing on the card.

    Less than a twentieth of the card is not worth a word.
    """
    total, free, reserved = message.total_bytes, message.free_bytes, message.reserved_bytes
    held = message.others_bytes.expected if message.others_bytes is not None else None
    if total is None or free is None or reserved is None:
        return held
    if held is None:
        own = message.process_bytes
        mine = own.expected if own is not None else reserved.expected + _CONTEXT
        held = total.expected - free.expected - mine
    return held if held >= _LARGE * total.expected else None


_SPEAKERS: Final[dict[str, tuple[str, str]]] = {
    "bitsandbytes": (
        "a CUDA call of bitsandbytes failed, outside torch's allocator: the managed memory of a "
        "paged optimizer, which the host has to hold, or a kernel's own buffer",
        "take an optimizer that is not paged to tell the two apart, and leave the host room; on "
        "WSL managed memory is short",
    ),
    "cuBLAS": (
        "cuBLAS found no memory for its handle: it takes it from the driver, and torch's cache "
        "had left too little",
        "leave the card some memory: a smaller run, or "
        "torch.cuda.set_per_process_memory_fraction(0.95)",
    ),
    "cuDNN": (
        "cuDNN found no memory outside torch's allocator",
        "leave the card some memory: a smaller run, or "
        "torch.cuda.set_per_process_memory_fraction(0.95)",
    ),
    "NCCL": (
        "NCCL found no memory for its buffers, which it takes from the driver when ranks connect",
        "leave the card some memory: a smaller run, or fewer NCCL channels "
        "(NCCL_MAX_NCHANNELS, NCCL_BUFFSIZE)",
    ),
    "the CUDA runtime": (
        "a CUDA call failed outside torch's allocator, and names no size",
        "look in nvidia-smi who holds the card; paste the whole message if torch printed one",
    ),
}  # fmt: skip


def _outside(message: OomMessage) -> Finding:
    summary, advice = _SPEAKERS[message.speaker]
    tried = message.tried_bytes.expected if message.tried_bytes else 0
    return Finding("outside torch", tried, summary, advice)


# -- who ---------------------------------------------------------------------------------------


def _askers(message: OomMessage, question: Question) -> Iterable[Asker]:
    """Return the tensors that would ask for the size, those nearest in allocated bytes first."""
    allocated = message.allocated_bytes
    said = allocated.expected if allocated is not None else None
    nearest: dict[tuple[str, str], Asker] = {}
    for each in asking(message, question, question.request):
        asker = _asker(each, said)
        known = nearest.setdefault((each.moment, each.name), asker)
        if (asker.off_bytes or 0) < (known.off_bytes or 0):
            nearest[each.moment, each.name] = asker
    return sorted(nearest.values(), key=lambda asker: asker.off_bytes or 0)


def asking(message: OomMessage, question: Question, request: EstimateRequest) -> Iterator[Request]:
    """Yield what asks the driver for as much as the message says, in a run of the same model."""
    tried = message.tried_bytes
    if tried is None or message.speaker != "torch":
        return
    engine = engine_for(request, question.config, question.name)
    device = device_of(question.gpu, request)
    for each in engine.requests(request.micro_batch_size, request.seq_len, device):
        if tried.low <= segment_size(round_size(each.size_bytes)) <= tried.high:
            yield each


def _asker(request: Request, said: int | None) -> Asker:
    return Asker(
        turn=request.turn,
        moment=request.moment,
        tensor=request.name,
        size_bytes=request.size_bytes,
        allocated_bytes=request.before_bytes,
        off_bytes=None if said is None else abs(request.before_bytes - said),
    )
