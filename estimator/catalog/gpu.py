"""GPUs: what each one offers to a process, and how a person's name for it is understood."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Literal

from msgspec import Struct

from estimator.catalog.folder import load
from estimator.errors import UnknownGpuError
from estimator.units import Bytes

MAX_NAMED: Final = 8

# Words that every card of a maker carries: people leave them out, drivers print them.
_NOISE: Final = frozenset(
    {"nvidia", "amd", "intel", "apple", "geforce", "rtx", "gtx", "rx", "tesla", "quadro"}
    | {"instinct", "radeon", "arc", "gpu", "graphics", "generation"}
)
_MEMORY: Final = re.compile(r"(\d+) *gi?b\b")
_SERIES: Final = re.compile(r"\b(?:rtx|gtx|rx)(?=\d)")
_SOCKET: Final = re.compile(r"\bsxm\d\b")
_WORD: Final = re.compile(r"[a-z0-9+]+")


class Gpu(Struct, frozen=True, eq=False):
    """One kind of GPU.

    Args:
        key: our short name, as `--gpu` takes it.
        name: the maker's name.
        aliases: other names, among them what nvidia-smi and torch print.
        compute_capability: NVIDIA's number, or the maker's own target name (`gfx942`).
        nominal_bytes: the size on the box [bytes], read as GiB.
        usable_bytes: what torch reports as `total_memory` on Linux [bytes]; None when no figure of
            a driver is known.
        usable_basis: `reported` by torch, or `assumed` from another figure.
        usable_source: where `usable_bytes` comes from, or why it is not known.
        bandwidth_bytes_per_second: of the device memory.
        multiprocessors: number of streaming multiprocessors, where a source gives it.
        tflops_dense: peak rates without sparsity [TFLOP/s] by number format.
        unsourced: fields of this row that no opened source shows.
    """

    key: str
    name: str
    aliases: tuple[str, ...]
    vendor: str
    segment: str
    laptop: bool
    architecture: str
    compute_capability: str
    nominal_bytes: Bytes
    usable_bytes: Bytes | None
    usable_basis: Literal["reported", "assumed"] | None
    usable_source: str
    bandwidth_bytes_per_second: int | None
    multiprocessors: int | None
    tflops_dense: Mapping[str, float]
    bf16_supported: bool
    flash_attention_2_supported: bool
    unsourced: tuple[str, ...]
    sources: tuple[str, ...]
    notes: str

    @property
    def multiplies_in_8_bits(self) -> bool:
        """Whether an NVIDIA card multiplies 8-bit floats: Ada, Hopper and later.

        Source: torchtitan-quantization, float8.py, Float8LinearConverter.
        """
        major, _, minor = self.compute_capability.partition(".")
        return not major.isdigit() or (int(major), int(minor)) >= (8, 9)


@lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """Return every GPU of the catalogue, in the order of the file."""
    return tuple(_gpu(key, row) for key, row in load("gpus.json").items())


@lru_cache(maxsize=256)
def find_gpu(name: str) -> Gpu:
    """Return the GPU that a name means: a key, a maker's name, or what a driver prints.

    Case, maker's words and punctuation do not matter; a name that leaves a choice is refused.

    Raises:
        UnknownGpuError: no card, or more than one, has this name.

    Example:
        >>> find_gpu("NVIDIA GeForce RTX 4090").key
        'rtx-4090'
    """
    words = _words(name)
    exact = _by_words().get(words)
    if exact is not None:
        return exact
    partial = tuple(
        dict.fromkeys(gpu for known, gpu in _by_words().items() if words and words <= known)
    )
    if len(partial) == 1:
        return partial[0]
    if partial:
        raise UnknownGpuError(f"GPU {name!r} could be {_listed(partial)}; name one of them")
    raise UnknownGpuError(
        f"unknown GPU {name!r}{_closest(name)}; `estimate gpus` lists all {len(gpus())}, or give "
        "the memory that its driver offers (--memory, hardware.memory_bytes)"
    )


def _gpu(key: str, row: dict[str, Any]) -> Gpu:
    lists = {field: tuple(row[field]) for field in ("aliases", "unsourced", "sources")}
    rates = MappingProxyType(row["tflops_dense"])
    return Gpu(**{**row, **lists, "key": key, "tflops_dense": rates})


@lru_cache(maxsize=1)
def _by_words() -> dict[frozenset[str], Gpu]:
    """Return each GPU under the words of its key, its name and its aliases."""
    return {_words(name): gpu for gpu in gpus() for name in (*gpu.aliases, gpu.name, gpu.key)}


def _words(name: str) -> frozenset[str]:
    """Return the words that tell one card from another.

    Example:
        >>> sorted(_words("NVIDIA H100 80 GB SXM5"))
        ['80gb', 'h100', 'sxm']
    """
    text = _SERIES.sub("", _SOCKET.sub("sxm", _MEMORY.sub(r"\1gb", name.lower())))
    return frozenset(_WORD.findall(text)) - _NOISE


def _closest(name: str) -> str:
    # difflib is slow to import and needed only on this path.
    import difflib

    close = difflib.get_close_matches(name.lower(), [gpu.key for gpu in gpus()], n=3, cutoff=0.5)
    return f"; closest known: {', '.join(close)}" if close else ""


def _listed(found: tuple[Gpu, ...]) -> str:
    keys = ", ".join(gpu.key for gpu in found[:MAX_NAMED])
    more = len(found) - MAX_NAMED
    return f"{keys} and {more} more" if more > 0 else keys
