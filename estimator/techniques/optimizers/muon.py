"""Muon of torch for the hidden matrices, and torch's AdamW for everything else."""

from __future__ import annotations

from typing import Final

from estimator.dtypes import DType
from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same, scalar
from estimator.techniques.optimizers.temporaries import Step, Update, in_turn, nothing
from estimator.techniques.optimizers.torch_optim import foreach_adam, single_adam

_BF16: Final = DType.BFLOAT16.width
_MUON: Final = Cite("torch-optim", "_muon.py, _single_tensor_muon")
_ADAM: Final = Cite("muon", "README.md, Usage: embeddings, head, gains and biases")


def is_hidden_matrix(each: Trained) -> bool:
    """Whether Muon updates a tensor: two dimensions, and neither a table nor the head.

    Source: torch-optim, _muon.py, Muon.__init__; muon, README.md, Usage.
    """
    return each.in_body and bool(each.rows) and each.elements == each.rows * each.columns


def _hidden(each: Trained) -> int:
    return same(each) if is_hidden_matrix(each) else 0


def _other(each: Trained) -> int:
    return 0 if is_hidden_matrix(each) else same(each)


def _other_scalar(each: Trained) -> int:
    return 0 if is_hidden_matrix(each) else scalar(each)


def _newton_schulz(step: Step, tensors: tuple[Trained, ...]) -> None:
    """Orthogonalize one matrix after the other, in bf16; the update lives until the next one is.

    Shapes:
        update                     as the weight, in its type; where that is bf16, the first
                                   `ortho_grad` is the update itself
        ortho_grad                 as the weight, in bf16
        gram_matrix, gram_update   square over the shorter side, in bf16

    Source: torch-optim, _muon.py, _zeropower_via_newtonschulz; of the five iterations the third
    repeats the second.
    """
    update = None
    for each in in_turn(tensors):
        update = step.like(each)  # grad.lerp(buf, momentum)
        square = min(each.rows, each.columns) ** 2 * _BF16
        wide = each.elements * _BF16
        ortho_grad = update if each.dtype is DType.BFLOAT16 else step.new(wide)
        for _ in range(2):
            gram_matrix = step.new(square)
            gram_update = step.new(square)
            ortho_grad = step.new(wide)
        del gram_matrix, gram_update
        update = ortho_grad
        del ortho_grad
    del update


def _step(adamw: Update) -> Update:
    """Return the step of Muon, and then of one implementation of AdamW."""

    def both(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
        hidden = tuple(each for each in tensors if is_hidden_matrix(each))
        others = tuple(each for each in tensors if not is_hidden_matrix(each))
        if hidden:
            _newton_schulz(step, hidden)
        if others:
            adamw(step, others, choice)

    return both


MUON: Final[dict[str, OptimizerRow]] = {
    "muon": OptimizerRow(
        (
            State("momentum_buffer", _hidden, Cite("torch-optim", "_muon.py, Muon._init_group")),
            State("exp_avg", _other, _ADAM),
            State("exp_avg_sq", _other, _ADAM),
            State(
                "step",
                _other_scalar,
                Cite("torch-optim", "adam.py, Adam._init_group, capturable or fused"),
                lambda choice: choice.implementation == "fused",
            ),
        ),
        {"foreach": _step(foreach_adam), "fused": _step(nothing), "single": _step(single_adam)},
        "foreach",
        _MUON,
        note="Muon updates the two-dimensional weights of the layers; embedding tables, the head, "
        "vectors and stacked expert weights have torch's AdamW beside it, and `implementation` is "
        "that of AdamW",
        # It tells weights apart by their module, which an fp32 copy does not have.
        not_with=("master_bf16", "megatron_bf16"),
    ),
}
