"""The second forward and backward pass with which SophiaG estimates the Hessian now and then."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from estimator.run import Run
from estimator.techniques.optimizers import OPTIMIZERS

# What the names of this pass's moments begin with.
HESSIAN: Final = "Hessian "


def hessian_pass(run: Run) -> Run | None:
    """Return the pass as a run of its own, over the same weights and states; None without one.

    It has the micro-batches of a step, whose gradients go to the optimizer's estimate.

    Source: sophia, train_sophiag.py, behind `iter_num % hess_interval`.
    """
    if not OPTIMIZERS[run.optimizer.name].estimates_hessian:
        return None
    return replace(run, loss="sampled", keeps_outputs=False)
