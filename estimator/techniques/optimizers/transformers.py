"""The optimizer that transformers brings itself: Adafactor."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained, in_fp32, scalar
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn


def second_moment(each: Trained) -> int:
    """Bytes of the second moment: a row and a column of a matrix, all of a vector, in fp32.

    Source: shazeer2018, algorithms 4 and 5; hf-optimization, Adafactor.step.
    """
    if not each.rows:
        return each.elements * FP32
    leading = each.elements // (each.rows * each.columns)
    return leading * (each.rows + each.columns) * FP32


def adafactor(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run Adafactor's step, one parameter after the other.

    Source: hf-optimization, Adafactor.step.
    """
    name: dict[str, Scratch] = {}
    for each in in_turn(tensors, step):
        update_in_fp32(step, each, choice, name)


def update_in_fp32(
    step: Step, each: Trained, choice: OptimizerChoice, name: dict[str, Scratch]
) -> None:
    """Update one parameter, all of it in fp32.

    The names keep their tensors until the next parameter takes them over; a first moment is
    the update itself, so that the tensor that held it is free before the negative is made.

    Source: hf-optimization, Adafactor.step.
    """
    if each.dtype.is_half:
        name["grad"] = step.fp32(each)
        name["p_data_fp32"] = step.fp32(each)
    name["update"] = step.fp32(each, step.fp32(each))  # grad**2 + eps
    if each.rows:
        means(step, each)
        name["update"] = step.fp32(each, factors(step, each))
    else:
        name["update"] = step.fp32(each)
    if choice.asked.beta1 is not None:
        del name["update"]
    step.fp32(each)  # -update


def means(step: Step, each: Trained) -> None:
    """`update.mean(dim=-1)` and `update.mean(dim=-2)`, one after the other."""
    step.new(each.elements // each.columns * FP32)
    step.new(each.elements // each.rows * FP32)


def factors(step: Step, each: Trained) -> tuple[Scratch, Scratch]:
    """`r_factor` and `c_factor` of _approx_sq_grad."""
    row = step.new(each.elements // each.columns * FP32)
    return row, step.new(each.elements // each.rows * FP32)


TRANSFORMERS: Final[dict[str, OptimizerRow]] = {
    "adafactor": OptimizerRow(
        (
            State("exp_avg_sq", second_moment, Cite("shazeer2018", "algorithms 4 and 5")),
            State("RMS", scalar, Cite("hf-optimization", "Adafactor.step, state['RMS']")),
            State(
                "exp_avg",
                in_fp32,
                Cite("hf-optimization", "Adafactor.step, beta1"),
                lambda choice: choice.asked.beta1 is not None,
            ),
        ),
        {"single": adafactor},
        "single",
        Cite("hf-optimization", "Adafactor.step"),
        ("beta1",),
    ),
}
