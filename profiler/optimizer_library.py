"""What the builders of optimizers have in common."""

from __future__ import annotations

import importlib
from typing import Any, Final

from estimator.errors import InvalidRequestError, MissingDependencyError
from estimator.optimizer import Optimizer

LEARNING_RATE: Final = 1e-5


def library(module: str, package: str, asked: Optimizer) -> Any:
    """Return the module of an optimizer's library.

    Raises:
        MissingDependencyError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"optimizer {asked.name!r} needs {package}; run: pip install {package}"
        ) from error


def refuse_implementation(asked: Optimizer) -> None:
    """Refuse foreach, fused and single for an optimizer that has one way to step."""
    if asked.implementation is not None:
        raise InvalidRequestError(
            f"optimizer {asked.name!r} has one implementation; leave out {asked.implementation!r}"
        )
