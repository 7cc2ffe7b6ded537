"""GaLore under 8-bit Adam of bitsandbytes and under Adafactor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.run import OptimizerChoice
from estimator.sources import Cite
from estimator.techniques.optimizers.low_rank import (
    LOW_RANK,
    MASTERED,
    ortho,
    projected,
    renew,
    split_linears,
)
from estimator.techniques.optimizers.row import FP32, OptimizerRow, State, Trained, scalar
from estimator.techniques.optimizers.temporaries import Scratch, Step, in_turn
from estimator.techniques.optimizers.transformers import (
    factors,
    means,
    second_moment,
    update_in_fp32,
)

EIGHT_BIT_BLOCK: Final = 256
SMALLEST_8BIT: Final = 4096
_ADAM_8BIT: Final = Cite("galore-torch", "adamw8bit.py, AdamW8bit.step")
_STATE: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer2State.init_state")
_ADAFACTOR: Final = Cite("galore-torch", "adafactor.py, Adafactor.step")
_PROJECTOR: Final = Cite("galore-torch", "galore_projector.py, GaLoreProjector")

Bytes = Callable[[Trained], int]


def _seen(each: Trained, choice: OptimizerChoice) -> int:
    """Numbers that the optimizer inside sees: the projected gradient of a linear layer."""
    return projected(each, choice) // each.dtype.width if each.in_linear else each.elements


def _codes(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of one moment: 1 byte for each value, fp32 below the smallest size.

    The Trainer's exception for embeddings is made for classes of bitsandbytes itself.

    Source: bitsandbytes, optim/optimizer.py, Optimizer2State.init_state; hf-trainer,
    Trainer.create_optimizer.
    """
    seen = _seen(each, choice)
    return seen if seen >= SMALLEST_8BIT else seen * FP32


def _absmax(each: Trained, choice: OptimizerChoice) -> int:
    seen = _seen(each, choice)
    return -(-seen // EIGHT_BIT_BLOCK) * FP32 if seen >= SMALLEST_8BIT else 0


def _step_8bit(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run the step: each weight waits in a copy while its kernel works on the projection.

    The projected gradient takes the place of the gradient, which is free from there on.

    Source: galore-torch, adamw8bit.py, AdamW8bit.step.
    """
    _, linears = split_linears(tensors)
    kept: list[Scratch] = []
    met: set[Trained] = set()
    for each in in_turn(linears):
        low = projected(each, choice)
        renew(step, each, choice)
        count = each.count - 1 if each in met else 1
        kept.append(step.new(*[low] * count))
        saved = step.like(each)  # p.data.clone()
        data = step.new(low)  # grad.clone()
        del saved
        step.spend(each, count)
        step.like(each, step.like(each))  # full_rank_grad * scale
        del data
        met.add(each)


def _in_fp32(each: Trained) -> Trained:
    return replace(each, dtype=DType.FLOAT32)


def _factors(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of the second moment: a row and a column of the projected gradient, in fp32."""
    if not each.in_linear:
        return second_moment(each)
    rank = min(choice.asked.rank, each.rows, each.columns)
    return (max(each.rows, each.columns) + rank) * FP32


def _ortho(each: Trained, choice: OptimizerChoice) -> int:
    """Bytes of the projector: that of an fp32 gradient, whatever the type of the weight."""
    return ortho(_in_fp32(each), choice)


def _step_adafactor(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Run Adafactor's step, which projects the fp32 copy of the gradient.

    Source: galore-torch, adafactor.py, Adafactor.step.
    """
    name: dict[str, Scratch] = {}
    others, linears = split_linears(tensors)
    for each in in_turn(others, step):
        update_in_fp32(step, each, choice, name)
    for each in in_turn(linears, step):
        if each.dtype.is_half:
            name["grad"] = step.fp32(each)
        else:
            name.pop("grad", None)
        wide = _in_fp32(each)
        rank = min(choice.asked.rank, each.rows, each.columns)
        low = replace(wide, elements=max(each.rows, each.columns) * rank)
        low = replace(low, rows=max(each.rows, each.columns), columns=rank)
        renew(step, wide, choice)
        name["grad"] = step.fp32(low)
        if each.dtype.is_half:
            name["p_data_fp32"] = step.fp32(each)
        name["update"] = step.fp32(low, step.fp32(low))  # grad**2 + eps
        means(step, low)
        name["update"] = step.fp32(low, factors(step, low))
        name["update"] = step.fp32(each, step.fp32(each))  # full_rank_grad * scale
        step.fp32(each)  # -update


def _states_8bit(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return the states of 8-bit Adam; bitsandbytes 0.50 takes GaLore's clipping for `max_unorm`.

    Source: galore-torch, adamw8bit.py, AdamW8bit.__init__ (its tenth argument); bitsandbytes,
    optim/optimizer.py, Optimizer2State.init_state.
    """
    codes: Bytes = lambda each: _codes(each, choice)  # noqa: E731 - one for two states
    absmax: Bytes = lambda each: _absmax(each, choice)  # noqa: E731 - one for two states
    return (
        State("state1", codes, _STATE),
        State("state2", codes, _STATE),
        State("absmax1", absmax, _STATE),
        State("absmax2", absmax, _STATE),
        State("unorm_vec", scalar, _STATE),
        State("ortho_matrix", lambda each: ortho(each, choice), _PROJECTOR),
    )


def _states_adafactor(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return the states of Adafactor at the rank that was asked for."""
    return (
        State("exp_avg_sq", lambda each: _factors(each, choice), _ADAFACTOR),
        State("RMS", scalar, _ADAFACTOR),
        State("ortho_matrix", lambda each: _ortho(each, choice), _PROJECTOR),
    )


_NOTE: Final = LOW_RANK["galore_adamw"].note

GALORE_VARIANTS: Final[dict[str, OptimizerRow]] = {
    "galore_adamw_8bit": OptimizerRow(
        _states_8bit,
        {"single": _step_8bit},
        "single",
        _ADAM_8BIT,
        knobs=("rank",),
        trains_all=True,
        not_with=MASTERED,
        groups_itself=True,
        spends_gradients=True,
        note=_NOTE,
    ),
    "galore_adafactor": OptimizerRow(
        _states_adafactor,
        {"single": _step_adafactor},
        "single",
        _ADAFACTOR,
        knobs=("rank",),
        trains_all=True,
        not_with=MASTERED,
        groups_itself=True,
        note=_NOTE,
    ),
}
