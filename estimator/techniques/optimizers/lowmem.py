"""Adafactor with stochastic rounding of bf16 weights, as usamec/lowmem_finetuning writes it."""

from __future__ import annotations

from typing import Final

from estimator.dtypes import DType
from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn

_BOOL: Final = DType.BOOL.width
_FLOAT: Final = DType.FLOAT32.width


def second_moment(each: Trained) -> int:
    """Bytes of the second moment: a row and a column of a matrix, in the gradient's type.

    Source: lowmem, utils.py, adafactor_step.
    """
    if not each.rows:
        return each.bytes
    leading = each.elements // (each.rows * each.columns)
    return leading * (each.rows + each.columns) * each.dtype.width


def step(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run the step, one parameter after the other; its names live until it returns.

    Source: lowmem, utils.py, adafactor_step and Adafactor.step.
    """
    for each in in_turn(tensors, step):
        name: dict[str, Scratch] = {}
        if each.rows:
            name["grad_sq"] = step.like(each)
            quotient = step.like(each, step.like(each))  # vr * vc, div(...)
            name["denom"] = step.like(each, quotient)
            del quotient
        else:
            name["denom"] = step.like(each)
        name["update"] = step.like(each)  # g / denom
        scaled = step.like(each, name["update"])
        name["update"] = step.like(each, scaled)
        del scaled
        if each.dtype is DType.BFLOAT16:
            add_stochastically(step, each)


def add_stochastically(step: Step, each: Trained) -> None:
    """Add the update and round to one of the two neighbours by chance.

    The direction of the other neighbour is made in fp32, the type of two Python numbers.

    Source: lowmem, utils.py, add_scaled_bf16.
    """
    kept = [step.like(each) for _ in ("move", "x", "real_move", "error")]
    chosen = step.new(each.elements * _FLOAT, held=step.new(each.elements * _BOOL))
    direction = step.like(each, chosen)
    del chosen
    kept.append(step.like(each, direction))  # x_farther
    del direction
    kept.append(step.like(each, step.like(each)))  # ulp, of the difference
    kept.append(step.like(each))  # rand_unif
    product, error = step.like(each), step.like(each)
    kept.append(step.new(each.elements * _BOOL, held=(product, error)))
    del product, error
    step.like(each)  # x_stoch


LOWMEM: Final[dict[str, OptimizerRow]] = {
    "lowmem_adafactor": OptimizerRow(
        (State("v", second_moment, Cite("lowmem", "utils.py, adafactor_step")),),
        {"single": step},
        "single",
        Cite("lowmem", "utils.py, adafactor_step"),
    ),
}
