"""Optimizers of small libraries: lion-pytorch, schedulefree, torch-optimi, grokadamw."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same, scalar
from estimator.techniques.optimizers.temporaries import Scratch, Step, by_dtype, in_turn, nothing
from estimator.techniques.optimizers.torch_optim import foreach_adam

_SCHEDULE_FREE: Final = Cite("schedulefree", "adamw_schedulefree.py, AdamWScheduleFree.step")


def _lion(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`exp_avg.clone().mul_(beta1).add(grad, alpha=...).sgn_()`, in a function for each tensor.

    Source: lion-pytorch, lion_pytorch.py, update_fn.
    """
    for each in in_turn(tensors, step):
        step.like(each, step.like(each))


_STABLE: Final = Cite("torch-optimi", "stableadamw.py, StableAdamW._init_state")


def _compensation(each: Trained) -> int:
    """Bytes of what Kahan's sum has lost so far; only 16-bit weights have it.

    Source: torch-optimi, stableadamw.py, StableAdamW._init_state.
    """
    return each.bytes if each.dtype.is_half else 0


def _own_scalar(each: Trained) -> int:
    """Bytes of one number in the type of the weight."""
    return each.dtype.width


def _single_stable(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`grad.pow(2).div_(exp_avg_sq.maximum(eps_sq))`; the update itself needs one root.

    Source: torch-optimi, stableadamw.py, _single_param_stableadamw.
    """
    for each in in_turn(tensors):
        step.like(each, step.like(each))


def _foreach_stable(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`max_exp_avg_sqs`; everything else is computed in the gradients.

    Source: torch-optimi, stableadamw.py, _foreach_stableadamw.
    """
    for group in by_dtype(tensors):
        step.every(group)


def _grok(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Copies of the three states, which lie on the host, and the amplified gradient.

    The names keep the tensors of one parameter until those of the next take their place.

    Source: grokadamw, grokadamw.py, GrokAdamW._update_group.
    """
    name: dict[str, Scratch] = {}
    for each in in_turn(tensors):
        exp_avg, exp_avg_sq = step.like(each), step.like(each)
        name["exp_avg"], name["exp_avg_sq"] = exp_avg, exp_avg_sq
        del exp_avg, exp_avg_sq
        name["grok_ema"] = step.like(each)
        name["grok_grad"] = step.like(each, step.like(each))  # grad + lamb * grok_ema
        step.like(each)  # exp_avg_sq.sqrt().add_(eps)


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
    "stable_adamw": OptimizerRow(
        (
            State("exp_avg", same, _STABLE),
            State("exp_avg_sq", same, _STABLE),
            State("kahan_comp", _compensation, _STABLE),
            State("eps_sq", _own_scalar, _STABLE),
            State("mean_square", scalar, _STABLE, lambda choice: choice.implementation == "fused"),
        ),
        {"foreach": _foreach_stable, "fused": nothing, "single": _single_stable},
        "fused",
        Cite("torch-optimi", "stableadamw.py, _triton_stableadamw"),
    ),
    "grokadamw": OptimizerRow(
        (),
        {"single": _grok},
        "single",
        Cite("grokadamw", "grokadamw.py, GrokAdamW._update_group"),
        note="GrokAdamW keeps its three states in host memory, in the type of the weight, and "
        "copies those of one parameter at a time to the device; its clipping of each gradient "
        "adds numbers only",
    ),
}
