"""The dry run: two real training steps on fake tensors, and the result document they give.

This module can be imported without torch, so that a missing one becomes a clear refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from estimator.errors import MissingDependencyError
from estimator.request import EstimateRequest
from estimator.result import Parameters, Result
from profiler.trace import Trace

# Called with the share of the work that is done, from 0 to 1, and with what is being done.
Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class DryRun:
    """What was learnt from a traced run.

    Args:
        trace: both steps, over all layers of the model.
        parameters: counted on the whole model; tied tensors once.
        notes: what was decided for the user on the way.
        managed_bytes: optimizer states in CUDA managed memory, outside torch's counters [bytes].
    """

    trace: Trace
    parameters: Parameters
    notes: tuple[str, ...]
    managed_bytes: int


def dry_run(
    request: EstimateRequest, config: Mapping[str, Any], *, progress: Progress | None = None
) -> Result:
    """Answer a request by running its training step on fake tensors.

    Args:
        request: one single-GPU run.
        config: the model's config.json.
        progress: told how far the work is.

    Raises:
        EstimatorError: the run is not supported, refused by the real stack, or torch is missing.
    """
    from profiler.document import result

    return result(request, run(request, config, progress=progress))


def trace(
    request: EstimateRequest,
    config: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    every_layer: bool = False,
) -> Trace:
    """Trace two steps of a request's run; the second one is the one that is reported."""
    return run(request, config, progress=progress, every_layer=every_layer).trace


def run(
    request: EstimateRequest,
    config: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    every_layer: bool = False,
) -> DryRun:
    """Trace two steps of a request's run, and say what was learnt on the way.

    Args:
        request: one single-GPU run.
        config: the model's config.json.
        progress: told how far the work is.
        every_layer: trace every decoder layer instead of a few that stand for all.

    Raises:
        EstimatorError: the run is not supported, refused by the real stack, or torch is missing.
    """
    try:
        from profiler.fake_run import fake_run
    except ImportError as error:
        raise MissingDependencyError(
            f"the dry run needs {error.name!r}; run: pip install 'vramplan[profiler]'"
        ) from error
    return fake_run(request, dict(config), progress=progress or _silent, every_layer=every_layer)


def _silent(share: float, text: str) -> None:
    """Report to nobody."""
