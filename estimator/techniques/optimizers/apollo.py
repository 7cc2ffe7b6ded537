"""APOLLO: Adam on a random projection of the gradient, whose growth scales the gradient itself."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.low_rank import MASTERED, split_linears, step_in_full
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn

_ADAM: Final = Cite("apollo-torch", "apollo.py, AdamW.step")
_PROJECTOR: Final = Cite("apollo-torch", "random_projector.py, GradientProjector")
_LIMITER: Final = Cite("apollo-torch", "apollo.py, AdamW.step, state['scaled_grad']")


def _low(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of the projected gradient: the longer side by the rank, however large that is."""
    return max(each.rows, each.columns) * choice.asked.rank * each.dtype.width


def _moment(each: Trained, choice: OptimizerChoice) -> int:
    return _low(each, choice) if each.in_linear else each.bytes


def _drawn(each: Trained, choice: OptimizerChoice) -> int:
    """Numbers of the projector: the shorter side by the rank. It is kept, not drawn anew.

    Source: apollo-torch, random_projector.py, GradientProjector.get_orthogonal_matrix.
    """
    return min(each.rows, each.columns) * choice.asked.rank if each.in_linear else 0


def _norm(each: Trained) -> int:
    """Bytes of the norm of the last scaled gradient, by which the next one is limited."""
    return each.dtype.width if each.in_linear else 0


def _step(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run a step in which the projectors are drawn anew, as every `update_proj_gap` steps.

    Source: apollo-torch, apollo.py, AdamW.step.
    """
    name: dict[str, Scratch] = {}
    others, linears = split_linears(tensors)
    step_in_full(step, others, name)
    for each in in_turn(linears, step):
        name.pop("grad", None)
        low = _low(each, choice)
        _draw(step, each, choice)
        name["grad"] = step.new(low)
        name["denom"] = step.new(low)
        name["norm_grad"] = step.new(low)
        name["grad_scaling_factor"] = _factor(step, each, choice)
        name["scaled_grad"] = step.like(each)  # p.grad * grad_scaling_factor
        name["scaled_grad"] = step.like(each)  # scaled_grad / limiter
        name["norm_grad"] = name["scaled_grad"]


def _draw(step: Step, each: Trained, choice: OptimizerChoice) -> None:
    """Draw a projector in fp32, for whose type alone the gradient is copied; the old one lives.

    Source: apollo-torch, random_projector.py, GradientProjector.get_orthogonal_matrix.
    """
    drawn = _drawn(each, choice)
    matrix = step.fp32(each) if each.dtype.is_half else None
    projector = step.new(drawn * FP32, held=step.new(drawn * FP32))  # stable_randn(...) / sqrt
    rounded = step.new(drawn * each.dtype.width) if each.dtype.is_half else None
    del matrix, projector, rounded


def _factor(step: Step, each: Trained, choice: OptimizerChoice) -> Scratch:
    """Return the growth of each channel of the longer side, or that of the whole matrix."""
    channels = 1 if choice.asked.scale_type == "tensor" else max(each.rows, each.columns)
    norms = [step.new(channels * each.dtype.width) for _ in ("norm_grad", "grad, + 1e-8")]
    return step.new(channels * each.dtype.width, held=norms)


def _states(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return the states of APOLLO at the rank that was asked for."""
    return (
        State("exp_avg", lambda each: _moment(each, choice), _ADAM),
        State("exp_avg_sq", lambda each: _moment(each, choice), _ADAM),
        State("ortho_matrix", lambda each: _drawn(each, choice) * each.dtype.width, _PROJECTOR),
        State("scaled_grad", _norm, _LIMITER),
    )


APOLLO: Final[dict[str, OptimizerRow]] = {
    "apollo_adamw": OptimizerRow(
        _states,
        {"single": _step},
        "single",
        _ADAM,
        knobs=("rank", "scale_type"),
        trains_all=True,
        not_with=MASTERED,
        groups_itself=True,
    ),
}
