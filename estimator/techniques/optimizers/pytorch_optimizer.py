"""Optimizers of pytorch_optimizer: LAMB, SOAP and Shampoo."""

from __future__ import annotations

from typing import Final

from estimator.dtypes import DType
from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained, same
from estimator.techniques.optimizers.temporaries import Scratch, Step, by_dtype, in_turn

_LAMB: Final = Cite("pytorch-optimizer", "lamb.py, Lamb.init_group")
_SOAP: Final = Cite("pytorch-optimizer", "soap.py, SOAP.init_pre_conditioner")
_SHAMPOO: Final = Cite("pytorch-optimizer", "shampoo.py, Shampoo.init_group")
_INT64: Final = DType.INT64.width
# aten/src/ATen/native/cuda/MultiTensorApply.cuh, kChunkSize.
_CHUNK: Final = 65_536


def _own_scalar(each: Trained) -> int:
    """Bytes of one number in the type of the weight."""
    return each.dtype.width


def _foreach_lamb(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`updates = torch._foreach_sqrt(exp_avg_sqs)`, turned into the update in place.

    Their norms are added up from partial sums in fp32: for each tensor as many as the largest of
    them has chunks.

    Source: pytorch-optimizer, lamb.py, Lamb._step_foreach; torch,
    aten/src/ATen/native/cuda/ForeachReduceOp.cu, output_per_tensor.
    """
    for group in by_dtype(tensors):
        updates = step.every(group)
        chunks = max(-(-each.elements // _CHUNK) for each in group)
        step.new(sum(each.count for each in group) * chunks * FP32)
        del updates


def _single_lamb(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """`update = exp_avg_sq.sqrt()`, in a function for each tensor.

    Source: pytorch-optimizer, lamb.py, Lamb.update.
    """
    for each in in_turn(tensors):
        step.like(each)


def _sides(each: Trained, choice: OptimizerChoice) -> tuple[int, ...]:
    """Return the dimensions of a matrix that are no larger than SOAP preconditions.

    Source: pytorch-optimizer, soap.py, SOAP.init_pre_conditioner.
    """
    limit = choice.asked.max_precondition_dim
    return tuple(side for side in (each.rows, each.columns) if 0 < side <= limit)


def _squares(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of one square matrix for each such dimension, in the type of the gradient."""
    return sum(side**2 for side in _sides(each, choice)) * each.dtype.width


def soap(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return the moments, the statistics and their eigenbases."""
    return (
        State("exp_avg", same, _SOAP),
        State("exp_avg_sq", same, _SOAP),
        State("GG", lambda each: _squares(each, choice), _SOAP),
        State("Q", lambda each: _squares(each, choice), _SOAP),
    )


def _project(step: Step, each: Trained, grad: Scratch | None, sides: int) -> Scratch | None:
    """Return a product with the eigenbasis of each side; None stands for what was there before.

    Source: pytorch-optimizer, soap.py, SOAP.project.
    """
    for _ in range(sides):
        grad = step.like(each)
    return grad


def _soap(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run a step in which the eigenbases are renewed, as every `precondition_frequency` steps.

    The names keep the tensors of one parameter until those of the next take their place; the
    second moment that was sorted anew leaves its old self behind.

    Source: pytorch-optimizer, soap.py, SOAP.step.
    """
    name: dict[str, Scratch | None] = {}
    for each in in_turn(tensors):
        sides = len(_sides(each, choice))
        name["grad_projected"] = _project(step, each, None, sides)
        name.pop("exp_avg_sq", None)
        step.like(each)  # grad_projected.square()
        name["de_nom"] = step.like(each)
        name["exp_avg_projected"] = _project(step, each, None, sides)
        name["norm_grad"] = _project(step, each, step.like(each), sides)
        name["exp_avg_sq"] = _renew(step, each, choice)


def _renew(step: Step, each: Trained, choice: OptimizerChoice) -> Scratch | None:
    """Add to the statistics, then one power iteration and a QR decomposition for each side.

    Returns what takes the place of the second moment. cuSOLVER's workspace is not seen here.

    Source: pytorch-optimizer, soap.py, SOAP.update_pre_conditioner, get_orthogonal_matrix_qr.
    """
    width = each.dtype.width
    outer_product = None
    for side in _sides(each, choice):
        outer_product = step.new(side**2 * width)
    exp_avg_sq: Scratch | None = None
    matrices = []
    kept: dict[str, Scratch] = {}
    for side in _sides(each, choice):
        kept["matrix_product"] = step.new(side**2 * width)
        product = step.new(side**2 * width)  # o * matrix_product
        kept["est_eig"] = step.new(side * width)
        del product
        kept["sort_idx"] = step.new(side * _INT64, held=step.new(side * width))
        exp_avg_sq = step.like(each)
        kept["power_iter"] = step.new(side**2 * width)
        cast = step.new(side**2 * FP32) if each.dtype.is_half else None
        q, r = step.new(side**2 * FP32), step.new(side**2 * FP32)
        kept["q"], kept["_"] = q, r
        del cast, q, r
        if each.dtype.is_half:
            kept["q"] = step.new(side**2 * width)
        matrices.append(kept["q"])
    del outer_product
    return exp_avg_sq


def _power_svd(step: Step, side: int, each: Trained) -> Scratch:
    """Return the inverse root of a statistic by a singular value decomposition in fp32.

    cuSOLVER's own copy of the matrix and its workspace are not seen here.

    Source: pytorch-optimizer, utils/matrix.py, compute_power_svd.
    """
    square = side**2 * FP32
    cast = step.new(square) if each.dtype.is_half else None
    vectors = step.new(square, side * FP32, square)
    del cast
    product = step.new(square, held=step.new(square))  # (u * s) @ vh
    result = step.new(side**2 * each.dtype.width) if each.dtype.is_half else product
    del vectors, product
    return result


def _shampoo(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Precondition each side in turn by an inverse root that is computed anew.

    The preconditioned gradient takes the place of the one before (`momentum_buffer`).

    Source: pytorch-optimizer, shampoo.py, Shampoo.step.
    """
    name: dict[str, Scratch] = {}
    for each in in_turn(tensors):
        for position, side in enumerate(_all_sides(each)):
            name.pop("grad_t", None)
            if position:
                name["grad"] = step.like(each)  # transposed, contiguous
                name["grad_t"] = name["grad"]
            _power_svd(step, side, each)
            name["grad"] = step.like(each)
        del name["grad"]


def _all_sides(each: Trained) -> tuple[int, ...]:
    return (each.rows, each.columns) if each.rows else (each.elements,)


def _square(each: Trained) -> int:
    """Bytes of a square matrix for each dimension, however large, in the type of the gradient."""
    return sum(side**2 for side in _all_sides(each)) * each.dtype.width


def _refuses(each: Trained) -> str:
    """Return why a tensor was not compared: stacked weights are preconditioned otherwise."""
    if each.elements in (each.rows * each.columns, each.elements * (not each.rows)):
        return ""
    return f"{each.name} has more than two dimensions, which was not compared; use 'adamw'"


PYTORCH_OPTIMIZER: Final[dict[str, OptimizerRow]] = {
    "lamb": OptimizerRow(
        (
            State("exp_avg", same, _LAMB),
            State("exp_avg_sq", same, _LAMB),
            *(
                State(
                    name,
                    _own_scalar,
                    Cite("pytorch-optimizer", "lamb.py, Lamb.update"),
                    lambda choice: choice.implementation == "single",
                )
                for name in ("weight_norm", "adam_norm", "trust_ratio")
            ),
        ),
        {"foreach": _foreach_lamb, "single": _single_lamb},
        "foreach",
        Cite("pytorch-optimizer", "lamb.py, Lamb._step_foreach"),
    ),
    "soap": OptimizerRow(
        soap,
        {"single": _soap},
        "single",
        Cite("pytorch-optimizer", "soap.py, SOAP.step"),
        knobs=("max_precondition_dim",),
        refuses=_refuses,
        note="the step shown is one that renews SOAP's eigenbases, as every "
        "`precondition_frequency` steps; cuSOLVER's workspace, and the eigenvectors of the first "
        "step, for which 16-bit statistics are cast to fp64, are not counted",
    ),
    "shampoo": OptimizerRow(
        (
            State("pre_cond", _square, _SHAMPOO),
            State("inv_pre_cond", _square, _SHAMPOO),
            State("momentum_buffer", same, Cite("pytorch-optimizer", "shampoo.py, Shampoo.step")),
        ),
        {"single": _shampoo},
        "single",
        Cite("pytorch-optimizer", "shampoo.py, Shampoo.step"),
        refuses=_refuses,
        note="Shampoo preconditions every dimension, that of the vocabulary too; cuSOLVER's copy "
        "and workspace of its singular value decomposition are not counted",
    ),
}
