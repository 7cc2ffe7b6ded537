"""The optimizer in backward: each parameter is updated as soon as its gradient is there."""

from __future__ import annotations

from collections.abc import Callable

from estimator.dtypes import DType
from estimator.eager.size import dim, elements
from estimator.eager.tensor import Param, Storage, Tape, TensorKind
from estimator.run import Run
from estimator.techniques.optimizers import OPTIMIZERS, Trained, temporaries


def updater(run: Run) -> Callable[[Tape, Param], None]:
    """Return what the hook of a parameter allocates: the temporaries of a step over it alone.

    Source: torch-autograd, functions/accumulate_grad.cpp, AccumulateGrad::apply.
    """
    choice = run.optimizer
    source = OPTIMIZERS[choice.name].source
    tables = {module.name for module in run.spec.embeddings}
    known: dict[Param, tuple[int, ...]] = {}

    def update(tape: Tape, param: Param) -> None:
        if param not in known:
            known[param] = temporaries(choice, (_trained(param, tables),))
        name = f"{param.name}: temporaries of the step in backward"
        alive = []
        for size in known[param]:
            shape = (dim("bytes", size),)
            kind = TensorKind("optimizer_states", tape.site, name, DType.UINT8, shape, source)
            alive.append(Storage(tape, tape.kind(kind)))

    return update


def _trained(param: Param, tables: set[str]) -> Trained:
    rows, columns = (0, 0)
    if len(param.shape) >= 2:
        rows, columns = param.shape[-2].value, param.shape[-1].value
    return Trained(
        name=param.name,
        elements=elements(param.shape)[0],
        dtype=param.dtype,
        rows=rows,
        columns=columns,
        in_embedding=param.name.rpartition(".")[0] in tables,
        count=1,
    )
