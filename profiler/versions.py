"""Which software is in this process: what a record says of it."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Final

from estimator import __version__

# The package of each module that a recipe may run.
_PACKAGES: Final = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "trl": "trl",
    "triton": "triton",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "torchao": "torchao",
    "lion_pytorch": "lion-pytorch",
    "schedulefree": "schedulefree",
    "lomo_optim": "lomo-optim",
    "galore_torch": "galore-torch",
    "apollo_torch": "apollo-torch",
    "badam": "badam",
    "optimi": "torch-optimi",
    "grokadamw": "grokadamw",
    "sophia_opt": "sophia-opt",
    "pytorch_optimizer": "pytorch_optimizer",
    "adam_mini": "adam-mini",
}


def imported_versions() -> dict[str, str]:
    """Return the versions of the packages that this process has imported, ours among them."""
    found = {"vramplan": __version__}
    for module, package in _PACKAGES.items():
        if module in sys.modules:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
    return found


def python_version() -> str:
    """Return the version of Python."""
    return platform.python_version()


def allocator_settings() -> str:
    """Return what torch's allocator was told through the environment, under either name."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def file_stem(card: str, torch: str | None, transformers: str | None) -> str:
    """Return what the files of one card and one stack are called, records and calibration alike.

    Args:
        card: the catalogue's id, or the driver's name where the catalogue has none.

    Example:
        >>> file_stem("h100-80gb-sxm", "2.13.0+cu130", "5.23.0")
        'h100-80gb-sxm--torch-2.13-transformers-5.23'
    """
    name = "".join(sign if sign.isalnum() else "-" for sign in card.lower())
    return f"{name}--torch-{two_numbers(torch)}-transformers-{two_numbers(transformers)}"


def two_numbers(version: str | None) -> str:
    """Return the first two numbers of a version.

    Example:
        >>> two_numbers("2.13.0+cu130")
        '2.13'
    """
    return ".".join((version or "unknown").partition("+")[0].split(".")[:2])
