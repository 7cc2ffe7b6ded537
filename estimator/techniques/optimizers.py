"""Optimizers: the states that each keeps, and what its step allocates for a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.model.spec import Embedding, Module, Weight
from estimator.sources import Cite

EIGHT_BIT_BLOCK: Final = 256
SMALLEST_8BIT: Final = 4096
SMALLEST_PAGED: Final = 100_000


class Trained(Struct, frozen=True):
    """One trainable tensor as the optimizer sees it.

    Args:
        name: the module and the tensor.
        elements: its parameters.
        dtype: the type that the optimizer updates: fp32 where it holds a master copy.
        rows, columns: the last two dimensions of a matrix, 0 for a vector.
        in_embedding: it belongs to an embedding table.
        count: how many such tensors the model has.
    """

    name: str
    elements: int
    dtype: DType
    rows: int
    columns: int
    in_embedding: bool
    count: int

    @property
    def bytes(self) -> int:
        """Bytes of the tensor itself."""
        return self.elements * self.dtype.width


def trained(module: Module, weight: Weight, count: int, *, master: bool) -> Trained:
    """Describe a trainable weight to the optimizer."""
    rows, columns = (0, 0)
    if len(weight.shape) >= 2:
        rows, columns = weight.shape[-2].value, weight.shape[-1].value
    return Trained(
        name=f"{module.name}.{weight.name}",
        elements=weight.parameters,
        dtype=DType.FLOAT32 if master else weight.dtype,
        rows=rows,
        columns=columns,
        in_embedding=isinstance(module, Embedding),
        count=count,
    )


class State(Struct, frozen=True):
    """Bytes of one kind of state for one trained tensor.

    Args:
        managed: CUDA managed memory: on the device when used, but in none of torch's counters.
    """

    name: str
    bytes: Callable[[Trained], int]
    source: Cite
    managed: Callable[[Trained], bool] = lambda _: False


Temporaries = Callable[[tuple[Trained, ...]], tuple[int, ...]]
"""Sizes [bytes] of the tensors that are alive together at the worst moment of a step."""


class OptimizerRow(Struct, frozen=True):
    """One optimizer.

    Args:
        states: what it keeps for each trained tensor from the first step on.
        temporaries: for each implementation, what its step holds at its worst moment.
        default: the implementation that is meant when the request names none.
        source: where the temporaries are read from.
    """

    states: tuple[State, ...]
    temporaries: dict[str, Temporaries]
    default: str
    source: Cite


def _nothing(tensors: tuple[Trained, ...]) -> tuple[int, ...]:
    return ()


def _largest(copies: int) -> Temporaries:
    """Return `copies` of the largest tensor: one tensor is updated at a time."""

    def temporaries(tensors: tuple[Trained, ...]) -> tuple[int, ...]:
        return (max((each.bytes for each in tensors), default=0),) * copies

    return temporaries


def _all(tensors: tuple[Trained, ...]) -> tuple[int, ...]:
    """Return a copy of the largest group of one type: foreach updates a whole group at once."""
    groups: dict[DType, list[int]] = {}
    for each in tensors:
        groups.setdefault(each.dtype, []).extend([each.bytes] * each.count)
    return tuple(max(groups.values(), key=sum, default=[]))


def _same(each: Trained) -> int:
    return each.bytes


def _scalar(each: Trained) -> int:
    return DType.FLOAT32.width


def _is_8bit(each: Trained) -> bool:
    return each.elements >= SMALLEST_8BIT and not each.in_embedding


def _eight_bit(each: Trained) -> int:
    """Bytes of one moment: 1 byte for each value, or fp32 for small tensors.

    HF's Trainer keeps 32-bit states for every embedding.

    Source: dettmers2022, section 2.1; bitsandbytes, optim/optimizer.py,
    Optimizer2State.init_state; hf-trainer, Trainer.create_optimizer.
    """
    return each.elements if _is_8bit(each) else each.elements * DType.FLOAT32.width


def _absmax(each: Trained) -> int:
    """Bytes of a moment's scales: fp32 for each block of 256 values; they are never paged.

    Source: bitsandbytes, optim/optimizer.py, Optimizer2State.init_state.
    """
    return -(-each.elements // EIGHT_BIT_BLOCK) * DType.FLOAT32.width if _is_8bit(each) else 0


def _is_paged(each: Trained) -> bool:
    return each.elements >= SMALLEST_PAGED


def _adafactor_state(each: Trained) -> int:
    """Bytes of the second moment: a row and a column of a matrix, all of a vector, in fp32.

    Source: shazeer2018, algorithms 4 and 5; hf-optimization, Adafactor.step.
    """
    if not each.rows:
        return each.elements * DType.FLOAT32.width
    leading = each.elements // (each.rows * each.columns)
    return leading * (each.rows + each.columns) * DType.FLOAT32.width


def _adafactor_step(tensors: tuple[Trained, ...]) -> tuple[int, ...]:
    """Return fp32 copies of the gradient and the weight, the update and its negative or square.

    Source: hf-optimization, Adafactor.step.
    """
    worst: tuple[int, ...] = ()
    for each in tensors:
        copies = 4 if each.dtype.is_half else 2
        worst = max(worst, (each.elements * DType.FLOAT32.width,) * copies, key=sum)
    return worst


_ADAM_STATES: Final = (
    State("exp_avg", _same, Cite("kingma2014", "algorithm 1, m")),
    State("exp_avg_sq", _same, Cite("kingma2014", "algorithm 1, v")),
)
_ADAM_STEP: Final[dict[str, Temporaries]] = {
    "foreach": _all,
    "fused": _nothing,
    "single": _largest(2),
}
_8BIT: Final = Cite("bitsandbytes", "optim/optimizer.py, Optimizer2State.init_state")


def _eight_bit_states(*, paged: bool) -> tuple[State, ...]:
    managed = _is_paged if paged else (lambda _: False)
    values = (State(name, _eight_bit, _8BIT, managed) for name in ("state1", "state2"))
    return (*values, State("absmax1", _absmax, _8BIT), State("absmax2", _absmax, _8BIT))


OPTIMIZERS: Final[dict[str, OptimizerRow]] = {
    "sgd": OptimizerRow(
        (),
        {"foreach": _nothing, "fused": _nothing, "single": _nothing},
        "foreach",
        Cite("torch-optim", "sgd.py, _multi_tensor_sgd"),
    ),
    "adam": OptimizerRow(
        _ADAM_STATES, _ADAM_STEP, "foreach", Cite("torch-optim", "adam.py, _multi_tensor_adam")
    ),
    "adamw": OptimizerRow(
        _ADAM_STATES, _ADAM_STEP, "fused", Cite("torch-optim", "adam.py, _multi_tensor_adam")
    ),
    "adamw_8bit": OptimizerRow(_eight_bit_states(paged=False), {"fused": _nothing}, "fused", _8BIT),
    "paged_adamw_8bit": OptimizerRow(
        _eight_bit_states(paged=True), {"fused": _nothing}, "fused", _8BIT
    ),
    "adafactor": OptimizerRow(
        (
            State("exp_avg_sq", _adafactor_state, Cite("shazeer2018", "algorithms 4 and 5")),
            State("RMS", _scalar, Cite("hf-optimization", "Adafactor.step, state['RMS']")),
        ),
        {"single": _adafactor_step},
        "single",
        Cite("hf-optimization", "Adafactor.step"),
    ),
}
MOMENTUM: Final = State("momentum_buffer", _same, Cite("torch-optim", "sgd.py, SGD._init_group"))
FUSED_STEP: Final = State(
    "step", _scalar, Cite("torch-optim", "adam.py, Adam._init_group, capturable or fused")
)
