"""GaLore: Adam on gradients that are projected to a low rank."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn

# Projections go by the weights of linear layers, of which these precisions update copies.
MASTERED: Final = ("master_bf16", "megatron_bf16")

_ADAM: Final = Cite("galore-torch", "adamw.py, AdamW.step")
_PROJECTOR: Final = Cite("galore-torch", "galore_projector.py, GaLoreProjector")


def _rank(each: Trained, choice: OptimizerChoice) -> int:
    return min(choice.asked.rank, each.rows, each.columns)


def projected(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of the projected gradient: the longer side of the matrix by the rank."""
    return max(each.rows, each.columns) * _rank(each, choice) * each.dtype.width


def _moment(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of a moment: of the projected gradient where the weight is that of a linear layer."""
    return projected(each, choice) if each.in_linear else each.bytes


def ortho(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of the projector: the shorter side by the rank.

    In fp32 it is a view, and keeps all singular vectors of that side alive.

    Source: galore-torch, galore_projector.py, GaLoreProjector.get_orthogonal_matrix.
    """
    if not each.in_linear:
        return 0
    shorter = min(each.rows, each.columns)
    kept = _rank(each, choice) if each.dtype.is_half else shorter
    return shorter * kept * each.dtype.width


def _step(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run a step in which the projectors are renewed, as they are every `update_proj_gap` steps.

    Weights of linear layers are a group of their own, behind all others.

    Source: galore-torch, adamw.py, AdamW.step.
    """
    name: dict[str, Scratch] = {}
    others, linears = split_linears(tensors)
    step_in_full(step, others, name)
    for each in in_turn(linears, step):
        name.pop("grad", None)
        low = projected(each, choice)
        renew(step, each, choice)
        name["grad"] = step.new(low)
        name["denom"] = step.new(low)
        name["norm_grad"] = step.new(low)
        name["norm_grad"] = step.like(each, step.like(each))  # full_rank_grad * scale


def split_linears(
    tensors: tuple[Trained, ...],
) -> tuple[tuple[Trained, ...], tuple[Trained, ...]]:
    """Return what is not projected and the weights of linear layers, as the Trainer groups them.

    Source: hf-trainer-optimizer, _setup_low_rank_optimizer.
    """
    return (
        tuple(each for each in tensors if not each.in_linear),
        tuple(each for each in tensors if each.in_linear),
    )


def step_in_full(step: Step, tensors: tuple[Trained, ...], name: dict[str, Scratch]) -> None:
    """Run Adam on what is not projected; its names live on."""
    for each in in_turn(tensors, step):
        name["denom"] = step.like(each)
        name["norm_grad"] = step.like(each)


def renew(step: Step, each: Trained, choice: OptimizerChoice) -> None:
    """Run the singular value decomposition of a gradient; the old projector lives until its end.

    cuSOLVER's own copy of the matrix and its workspace are not seen here.

    Source: galore-torch, galore_projector.py, GaLoreProjector.get_orthogonal_matrix.
    """
    rank, rows, columns = _rank(each, choice), each.rows, each.columns
    shorter = min(rows, columns)
    matrix = step.fp32(each) if each.dtype.is_half else None
    vectors = step.new(rows * shorter * FP32, shorter * columns * FP32)
    diagonal = step.new(rank * rank * FP32)
    product = step.new(max(rows, columns) * rank * FP32)
    del diagonal
    projector = step.new(ortho(each, choice)) if each.dtype.is_half else None
    del matrix, vectors, product, projector


def galore(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return the states of GaLore's Adam at the rank that was asked for."""
    return (
        State("exp_avg", lambda each: _moment(each, choice), _ADAM),
        State("exp_avg_sq", lambda each: _moment(each, choice), _ADAM),
        State("ortho_matrix", lambda each: ortho(each, choice), _PROJECTOR),
    )


LOW_RANK: Final[dict[str, OptimizerRow]] = {
    "galore_adamw": OptimizerRow(
        galore,
        {"single": _step},
        "single",
        _ADAM,
        knobs=("rank",),
        trains_all=True,
        not_with=MASTERED,
        groups_itself=True,
        note="cuSOLVER's workspace of GaLore's singular value decomposition is not counted",
    ),
}
