"""Optimizers of libraries that have one or two: lion-pytorch and schedulefree."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same
from estimator.techniques.optimizers.temporaries import Step, in_turn, nothing
from estimator.techniques.optimizers.torch_optim import foreach_adam

_SCHEDULE_FREE: Final = Cite("schedulefree", "adamw_schedulefree.py, AdamWScheduleFree.step")


def _lion(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`exp_avg.clone().mul_(beta1).add(grad, alpha=...).sgn_()`, in a function for each tensor.

    Source: lion-pytorch, lion_pytorch.py, update_fn.
    """
    for each in in_turn(tensors):
        step.like(each, step.like(each))


SMALL_LIBRARIES: Final[dict[str, OptimizerRow]] = {
    "lion": OptimizerRow(
        (State("exp_avg", same, Cite("lion-pytorch", "lion_pytorch.py, Lion.step")),),
        {"single": _lion},
        "single",
        Cite("lion-pytorch", "lion_pytorch.py, update_fn"),
    ),
    "schedule_free_adamw": OptimizerRow(
        (State("z", same, _SCHEDULE_FREE), State("exp_avg_sq", same, _SCHEDULE_FREE)),
        {"foreach": foreach_adam},
        "foreach",
        _SCHEDULE_FREE,
    ),
    "schedule_free_radam": OptimizerRow(
        (State("z", same, _SCHEDULE_FREE), State("exp_avg_sq", same, _SCHEDULE_FREE)),
        {"foreach": foreach_adam},
        "foreach",
        Cite("schedulefree", "radam_schedulefree.py, RAdamScheduleFree.step"),
    ),
    "schedule_free_sgd": OptimizerRow(
        (State("z", same, Cite("schedulefree", "sgd_schedulefree.py, SGDScheduleFree.step")),),
        {"foreach": nothing},
        "foreach",
        Cite("schedulefree", "sgd_schedulefree.py, SGDScheduleFree.step"),
    ),
}
