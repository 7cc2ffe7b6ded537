"""A row of the table of optimizers: the states that it keeps, and the step that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.model.spec import Embedding, Linear, Module, Weight
from estimator.run import OptimizerChoice, Run
from estimator.sources import Assumption, Cite

if TYPE_CHECKING:
    from estimator.techniques.optimizers.temporaries import Update

FP32: Final = DType.FLOAT32.width


class Trained(Struct, frozen=True):
    """One trainable tensor as the optimizer sees it.

    Args:
        name: the module and the tensor.
        elements: its parameters.
        dtype: the type that the optimizer updates: fp32 where it holds a master copy.
        rows, columns: the last two dimensions of a matrix, 0 for a vector.
        keeps_32bit: bitsandbytes is told to keep 32-bit states of it, as the Trainer tells it for
            embedding tables.
        count: how many such tensors the model has.
        in_linear: it is the weight of an `nn.Linear`.
        head_elements: the weights of one attention head in a square projection.
        in_body: it belongs neither to an embedding table nor to the head, adapters included.
    """

    name: str
    elements: int
    dtype: DType
    rows: int
    columns: int
    keeps_32bit: bool
    count: int
    in_linear: bool = False
    in_body: bool = True
    head_elements: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the tensor itself."""
        return self.elements * self.dtype.width


class Layout(Struct, frozen=True):
    """What an optimizer that tells weights apart has to know of the model.

    Args:
        outer: the names of the embedding tables and of the head.
        head_elements: the weights of one attention head in a square projection, or 0 where the
            heads do not divide it.
        tables_in_32bit: states of embedding tables keep 32 bits.
    """

    outer: tuple[str, ...]
    head_elements: int
    tables_in_32bit: bool

    def is_outer(self, name: str) -> bool:
        """Whether a tensor belongs to a table or the head, or to an adapter on one of them."""
        return any(name.startswith(f"{module}.") for module in self.outer)


def layout(run: Run) -> Layout:
    """Return what the optimizers know of a model."""
    spec = run.spec
    tables = (each.name for each in spec.embeddings if isinstance(each, Embedding))
    square, heads = spec.hidden.value**2, spec.kinds[0].heads.query.value
    return Layout(
        outer=(*tables, spec.head.name),
        head_elements=0 if square % heads else square // heads,
        tables_in_32bit=run.optimizer.low_bit.tables_in_32bit,
    )


def trained(module: Module, weight: Weight, count: int, *, master: bool, layout: Layout) -> Trained:
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
        # What is said about a module's weight is not said about the copy that is updated for it.
        keeps_32bit=isinstance(module, Embedding) and not master and layout.tables_in_32bit,
        count=count,
        in_linear=isinstance(module, Linear) and not module.transposed and weight.name == "weight",
        in_body=not layout.is_outer(f"{module.name}.{weight.name}"),
        head_elements=layout.head_elements,
    )


def _always(choice: OptimizerChoice) -> bool:
    return True


def _never(each: Trained) -> bool:
    return False


def updates_any(each: Trained) -> str:
    """Return no reason against a tensor: the optimizer updates tensors of any kind."""
    return ""


class State(Struct, frozen=True):
    """Bytes of one kind of state for one trained tensor.

    Args:
        when: whether the optimizer keeps it at all, with these knobs.
        managed: CUDA managed memory: on the device when used, but in none of torch's counters.
    """

    name: str
    bytes: Callable[[Trained], int]
    source: Cite | Assumption
    when: Callable[[OptimizerChoice], bool] = _always
    managed: Callable[[Trained], bool] = _never


class OptimizerRow(Struct, frozen=True):
    """One optimizer.

    Args:
        states: what it keeps for each trained tensor from the first step on; a function of the
            knobs where their sizes depend on them.
        updates: for each implementation, its step, which says what it holds for a moment.
        default: the implementation that is meant when the request names none.
        source: where the step is read from.
        knobs: fields of the request's section that this optimizer has.
        needs: those of them that it does not run without.
        fused_backward: it has no step of its own; hooks update parameters inside backward.
        note: what the answer says about it, where something is not counted.
        groups_itself: its parameter groups are not the Trainer's two.
        spends_gradients: its step drops gradients on the way.
        trains_all: it keeps states of frozen weights too, so that none may be frozen.
        estimates_hessian: now and then a second pass follows its step, with sampled labels.
        refuses: why it cannot update a tensor, or nothing.
        not_with: values of `precision` that it was not compared with.
    """

    states: tuple[State, ...] | Callable[[OptimizerChoice], tuple[State, ...]]
    updates: dict[str, Update]
    default: str
    source: Cite | Assumption
    knobs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    fused_backward: bool = False
    trains_all: bool = False
    groups_itself: bool = False
    spends_gradients: bool = False
    estimates_hessian: bool = False
    note: str = ""
    refuses: Callable[[Trained], str] = updates_any
    not_with: tuple[str, ...] = ()


def same(each: Trained) -> int:
    """Bytes of a state that is `zeros_like` the tensor: its type, its shape."""
    return each.bytes


def in_fp32(each: Trained) -> int:
    """Bytes of a state of the tensor's shape in fp32."""
    return each.elements * FP32


def scalar(each: Trained) -> int:
    """Bytes of one fp32 number."""
    return FP32
