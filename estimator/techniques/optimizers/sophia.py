"""SophiaG, whose estimate of the Hessian comes from a second backward pass now and then."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn

_STATES: Final = Cite("sophia", "sophia.py, SophiaG.step and SophiaG.update_hessian")


def _sophia(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`ratio`, which is alive under its name until that of the next tensor exists.

    `exp_avg.abs() / (rho * bs * hess + 1e-15)` holds both sides of the quotient and one more.

    Source: sophia, sophia.py, _single_tensor_sophiag.
    """
    name: dict[str, Scratch] = {}
    for each in in_turn(tensors):
        absolute = step.like(each)
        denominator = step.like(each, step.like(each))  # rho * bs * hess, then its sum with 1e-15
        quotient = step.like(each)
        del absolute, denominator
        name["ratio"] = step.like(each, quotient)
        del quotient
        step.like(each)  # exp_avg.sign()


SOPHIA: Final[dict[str, OptimizerRow]] = {
    "sophia": OptimizerRow(
        (State("exp_avg", same, _STATES), State("hessian", same, _STATES)),
        {"single": _sophia},
        "single",
        Cite("sophia", "sophia.py, _single_tensor_sophiag"),
        estimates_hessian=True,
        note="some of SophiaG's steps end with a second forward and backward pass, which "
        "estimates the Hessian (every 10th in its authors' script); it is counted as a function "
        "of its own. At the top level of a loop, where that script has it, the distribution of "
        "the labels keeps three tensors of the logits' size until the next pass",
        not_with=("master_bf16", "megatron_bf16", "amp_fp16"),
    ),
}
