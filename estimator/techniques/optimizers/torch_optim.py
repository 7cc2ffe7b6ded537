"""The optimizers of `torch.optim`: states in the type of the parameter, one step for each kind."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same, scalar
from estimator.techniques.optimizers.temporaries import Scratch, Step, by_dtype, in_turn, nothing


def _fused(choice: OptimizerChoice) -> bool:
    return choice.implementation == "fused"


def single_adam(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`denom = (exp_avg_sq.sqrt() / bias_correction2_sqrt).add_(eps)`, kept until the next one.

    Source: torch-optim, adam.py, _single_tensor_adam.
    """
    for each in in_turn(tensors):
        denom = step.like(each, step.like(each))
    del denom


def foreach_adam(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`exp_avg_sq_sqrt = torch._foreach_sqrt(...)`; everything else is in place.

    Source: torch-optim, adam.py, _multi_tensor_adam.
    """
    for group in by_dtype(tensors):
        square_root = step.every(group)
    del square_root


def _single_sgd(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """In place, but `grad = grad.add(buf, alpha=momentum)` with Nesterov's momentum.

    Source: torch-optim, sgd.py, _single_tensor_sgd.
    """
    if choice.asked.nesterov:
        for each in in_turn(tensors):
            step.like(each)  # at the next `grad = grads[i]` the sum is gone


def _single_adafactor(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """The estimate of the second moment, which becomes the update in place.

    Source: torch-optim, _adafactor.py, _single_tensor_adafactor.
    """
    name: dict[str, Scratch] = {}
    for each in in_turn(tensors):
        if each.rows:
            name["row_mean"] = step.new(each.bytes // each.columns)
            name["col_mean"] = step.new(each.bytes // each.rows)
            name["var_estimate"] = step.like(each)
            step.new(each.bytes // (each.rows * each.columns))  # row_var.mean(...)
        else:
            name["grad_squared"] = step.like(each)
            name["var_estimate"] = step.like(each)
        name["update"] = name["var_estimate"]


def _foreach_adafactor(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """An estimate for every tensor of a type and kind, which becomes the update in place.

    Source: torch-optim, _adafactor.py, _multi_tensor_adafactor.
    """
    for group in by_dtype(tensors):
        if not group[0].rows:
            squares = step.every(group)
            del squares
        estimates = step.every(group)
    del estimates


def _single_rmsprop(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`avg = square_avg.sqrt()`, or `square_avg.addcmul(...)` where centered.

    Source: torch-optim, rmsprop.py, _single_tensor_rmsprop.
    """
    for each in in_turn(tensors):
        avg = step.like(each)
    del avg


def _foreach_adagrad(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`std` and `numerator`.

    Source: torch-optim, adagrad.py, _multi_tensor_adagrad.
    """
    for group in by_dtype(tensors):
        std = step.every(group)
        numerator = step.every(group)
    del std, numerator


def _single_radam(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`bias_corrected_exp_avg * lr * _compute_adaptive_lr() * _compute_rect()`, from step 6 on.

    Source: torch-optim, radam.py, _single_tensor_radam.
    """
    for each in in_turn(tensors):
        corrected = step.like(each)
        scaled = step.like(each)
        root = step.like(each)
        adaptive = step.like(each, step.like(each))  # bias_correction2**0.5 / exp_avg_sq_sqrt
        del root
        product = step.like(each, (scaled, adaptive))
        del scaled, adaptive
        product = step.like(each, product)
        del product
    del corrected


_ADAM_STATES: Final = (
    State("exp_avg", same, Cite("kingma2014", "algorithm 1, m")),
    State("exp_avg_sq", same, Cite("kingma2014", "algorithm 1, v")),
)
_ADAM_EXTRA: Final = (
    State(
        "max_exp_avg_sq",
        same,
        Cite("torch-optim", "adam.py, Adam._init_group, amsgrad"),
        lambda choice: choice.asked.amsgrad,
    ),
    State(
        "step",
        scalar,
        Cite("torch-optim", "adam.py, Adam._init_group, capturable or fused"),
        _fused,
    ),
)
_ADAM: Final = OptimizerRow(
    (*_ADAM_STATES, *_ADAM_EXTRA),
    {"foreach": foreach_adam, "fused": nothing, "single": single_adam},
    "fused",
    Cite("torch-optim", "adam.py, _multi_tensor_adam"),
    ("amsgrad",),
)

TORCH: Final[dict[str, OptimizerRow]] = {
    "sgd": OptimizerRow(
        (
            State(
                "momentum_buffer",
                same,
                Cite("torch-optim", "sgd.py, SGD._init_group"),
                lambda choice: choice.asked.momentum > 0,
            ),
        ),
        {"foreach": nothing, "fused": nothing, "single": _single_sgd},
        "foreach",
        Cite("torch-optim", "sgd.py, _multi_tensor_sgd"),
        ("momentum", "nesterov"),
    ),
    "adam": OptimizerRow(_ADAM.states, _ADAM.updates, "foreach", _ADAM.source, _ADAM.knobs),
    "adamw": _ADAM,
    "nadam": OptimizerRow(
        _ADAM_STATES,
        {"foreach": foreach_adam, "single": single_adam},
        "foreach",
        Cite("torch-optim", "nadam.py, _multi_tensor_nadam"),
    ),
    "radam": OptimizerRow(
        _ADAM_STATES,
        {"foreach": foreach_adam, "single": _single_radam},
        "foreach",
        Cite("torch-optim", "radam.py, _multi_tensor_radam"),
    ),
    "rmsprop": OptimizerRow(
        (
            State("square_avg", same, Cite("torch-optim", "rmsprop.py, RMSprop._init_group")),
            State(
                "momentum_buffer",
                same,
                Cite("torch-optim", "rmsprop.py, RMSprop._init_group, momentum"),
                lambda choice: choice.asked.momentum > 0,
            ),
            State(
                "grad_avg",
                same,
                Cite("torch-optim", "rmsprop.py, RMSprop._init_group, centered"),
                lambda choice: choice.asked.centered,
            ),
        ),
        {"foreach": foreach_adam, "single": _single_rmsprop},
        "foreach",
        Cite("torch-optim", "rmsprop.py, _multi_tensor_rmsprop"),
        ("momentum", "centered"),
    ),
    "adagrad": OptimizerRow(
        (
            State("sum", same, Cite("torch-optim", "adagrad.py, Adagrad.__init__")),
            State("step", scalar, Cite("torch-optim", "adagrad.py, Adagrad.__init__"), _fused),
        ),
        {"foreach": _foreach_adagrad, "fused": nothing, "single": _single_rmsprop},
        "foreach",
        Cite("torch-optim", "adagrad.py, _multi_tensor_adagrad"),
    ),
}


def factors(each: Trained) -> int:
    """Bytes of the second moment in the tensor's type: a row and a column of a matrix."""
    if not each.rows:
        return each.bytes
    leading = each.bytes // (each.rows * each.columns)
    return leading * (each.rows + each.columns)


TORCH["torch_adafactor"] = OptimizerRow(
    (State("row_var, col_var", factors, Cite("torch-optim", "_adafactor.py, _init_group")),),
    {"single": _single_adafactor, "foreach": _foreach_adafactor},
    "single",
    Cite("torch-optim", "_adafactor.py, _single_tensor_adafactor"),
)
