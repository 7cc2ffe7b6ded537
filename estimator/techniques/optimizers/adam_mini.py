"""Adam-mini: a first moment for every weight, a second moment for every head, row or block."""

from __future__ import annotations

from typing import Final

from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn

_MINI: Final = Cite("adam-mini", "adam_mini.py, Adam_mini.step")
# Parts of a name, as Adam_mini.__init__ has them.
_HEADS: Final = ("k_proj", "q_proj", "wq", "wk", "query", "key")
_ROWS: Final = (
    *("embed", "embd", "wte", "lm_head", "output", "final_layer", "v_proj", "wv", "value"),
    *("feed_forward", "linear", "mlp", "o_proj", "wo", "attn.proj"),
)


def kind(each: Trained) -> str:
    """Return what shares a second moment: each weight, a head, a row, or the whole block.

    Source: adam-mini, adam_mini.py, Adam_mini.step.
    """
    name = each.name.lower()
    if "bias" in name:
        return "weight"
    if any(part in name for part in _HEADS):
        return "head"
    return "row" if any(part in name for part in _ROWS) else "block"


def _second(each: Trained) -> int:
    """Bytes of the second moment, in the type of the weight."""
    number = {
        "weight": each.elements,
        "head": each.elements // max(each.head_elements, 1),
        "row": each.rows,
        "block": 1,
    }
    return number[kind(each)] * each.dtype.width


def _refuses(each: Trained) -> str:
    """Return why the real step would raise: it views heads and rows as matrices."""
    if kind(each) == "head" and (not each.head_elements or each.elements % each.head_elements):
        return (
            f"{each.name} is not made of heads of hidden_size * hidden_size / "
            "num_attention_heads weights, into which Adam-mini divides it; use 'adamw'"
        )
    if kind(each) == "row" and each.elements != each.rows * each.columns:
        return f"Adam-mini takes {each.name} for a matrix by its name, and it is none; use 'adamw'"
    return ""


def _step(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Square a gradient, then the update and its negative; names live until they are taken over.

    Source: adam-mini, adam_mini.py, Adam_mini.step.
    """
    name: dict[str, Scratch] = {}
    for each in in_turn(tensors, step):
        if kind(each) == "weight":
            name["h"] = step.like(each, step.like(each))
            name.pop("stepsize", None)
            continue
        second = _second(each)
        name["tmp_lr"] = step.new(second, held=step.like(each))  # mean(grad * grad)
        name["h"] = step.new(second, held=step.new(second))
        name["stepsize"] = step.new(second)
        name["update"] = step.like(each)
        step.like(each)  # -update


ADAM_MINI: Final[dict[str, OptimizerRow]] = {
    "adam_mini": OptimizerRow(
        (State("m", same, _MINI), State("vmean", _second, _MINI)),
        {"single": _step},
        "single",
        _MINI,
        groups_itself=True,
        refuses=_refuses,
        note="Adam-mini goes by the names of the weights and is given the model's hidden_size and "
        "num_attention_heads",
        # It goes by names, which an fp32 copy does not have.
        not_with=("master_bf16", "megatron_bf16"),
    ),
}
