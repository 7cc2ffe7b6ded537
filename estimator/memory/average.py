"""A moving average of the weights: a second model beside the trained one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from estimator.dtypes import DType
from estimator.eager.size import Shape, elements
from estimator.memory.ledger import Entry, tensor_row
from estimator.run import Run
from estimator.sources import Cite

_AVERAGE: Final = Cite("torch-swa", "AveragedModel.__init__, deepcopy")


def average_entries(run: Run) -> list[Entry]:
    """Return the copy of the model that lives on the GPU, if it does.

    All weights are copied, frozen ones too, and the buffers; the update works in place.

    Source: torch-swa, AveragedModel.update_parameters and get_ema_multi_avg_fn.
    """
    if run.averaged_on != "cuda":
        return []
    entries = [
        Entry(
            tensor_row(f"{name}, moving average", "weights", "process", shape, dtype, _AVERAGE),
            count,
        )
        for name, shape, dtype, count in _copied(run)
    ]
    number = tensor_row("n_averaged", "buffers", "process", (), DType.INT64, _AVERAGE)
    return [*entries, Entry(number, 1)]


def average_host_bytes(run: Run) -> int:
    """Bytes of the copy in host memory, and of the weights that an update brings there.

    Shapes:
        the averaged model                as the model, buffers included
        weights of the model, all at once in the list that the update makes

    Source: torch-swa, AveragedModel.update_parameters, model_param_detached.
    """
    if run.averaged_on != "cpu":
        return 0
    return 2 * sum(_bytes(shape, dtype) * count for _, shape, dtype, count in _weights(run)) + sum(
        _bytes(each.shape, each.dtype) for each in run.spec.buffers
    )


def average_sizes(run: Run) -> Iterator[int]:
    """Yield the sizes of the copy on the GPU, tensor by tensor [bytes]."""
    for entry in average_entries(run):
        yield from (entry.row.size[0] for _ in range(entry.count))


def _weights(run: Run) -> Iterator[tuple[str, Shape, DType, int]]:
    for module, weight, count in run.spec.tensors():
        yield f"{module.name}.{weight.name}", weight.shape, weight.dtype, count


def _copied(run: Run) -> Iterator[tuple[str, Shape, DType, int]]:
    yield from _weights(run)
    yield from ((each.name, each.shape, each.dtype, 1) for each in run.spec.buffers)


def _bytes(shape: Shape, dtype: DType) -> int:
    return elements(shape)[0] * dtype.width
