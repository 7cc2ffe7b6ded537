"""LOMO and AdaLomo: the update is fused into backward, in fp32."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained
from estimator.techniques.optimizers.temporaries import Step, in_turn
from estimator.techniques.optimizers.transformers import factors, means, second_moment


def _lomo(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`grad_fp32` and `p_fp32`, which are the tensors themselves where those are fp32.

    Source: lomo-optim, lomo.py, Lomo.fuse_update.
    """
    for each in in_turn(tensors):
        if each.dtype.is_half:
            grad_fp32 = step.fp32(each)
            p_fp32 = step.fp32(each)
            del grad_fp32, p_fp32


def _adalomo(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """The update of Adafactor, then an fp32 copy of the weight.

    Source: lomo-optim, adalomo.py, AdaLomo.fuse_update.
    """
    for each in in_turn(tensors):
        copies = [step.fp32(each)] if each.dtype.is_half else []
        update = step.fp32(each, step.fp32(each))  # grad_fp32**2 + eps
        if each.rows:
            means(step, each)
            update = step.fp32(each, factors(step, each))
        else:
            update = step.fp32(each)
        if each.dtype.is_half:
            copies.append(step.fp32(each))
        del update


LOMO: Final[dict[str, OptimizerRow]] = {
    "lomo": OptimizerRow(
        (),
        {"single": _lomo},
        "single",
        Cite("lomo-optim", "lomo.py, Lomo.fuse_update"),
        fused_backward=True,
    ),
    "adalomo": OptimizerRow(
        (State("exp_avg_sq", second_moment, Cite("lomo-optim", "adalomo.py, AdaLomo.__init__")),),
        {"single": _adalomo},
        "single",
        Cite("lomo-optim", "adalomo.py, AdaLomo.fuse_update"),
        fused_backward=True,
        trains_all=True,
    ),
}
