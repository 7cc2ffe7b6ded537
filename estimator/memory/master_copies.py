"""fp32 copies of half-precision weights, and fp32 gradients, that stand beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from estimator.dtypes import DType
from estimator.memory.loading_parts import modules
from estimator.model.spec import Module, Weight
from estimator.run import Run


def master_copies(run: Run) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the fp32 copies, and of fp32 gradients that are there all the time.

    Source: megatron-optimizer, Float16OptimizerWithFloat16Params.__init__; megatron-ddp,
    _ParamAndGradBuffer.
    """
    if run.optimizer.master_weights:
        for module, weight in _updated(run):
            if weight.dtype.is_half:
                yield f"{module.name}.{weight.name}, fp32 master copy", _wide(weight)
    if run.optimizer.main_gradients:
        for module, weight in _updated(run):
            yield f"{module.name}.{weight.name}.main_grad", _wide(weight)


def is_first_group(shape: Sequence[object]) -> bool:
    """Say whether the Trainer puts a tensor into its first group, that of matrices.

    Source: hf-trainer, Trainer.create_optimizer.
    """
    return len(shape) > 1


def _wide(weight: Weight) -> int:
    return weight.parameters * DType.FLOAT32.width


def _updated(run: Run) -> Iterator[tuple[Module, Weight]]:
    """Yield what the optimizer updates, the Trainer's first group before its second."""
    found = [(module, each) for module in modules(run) for each in module.weights() if each.trained]
    yield from sorted(found, key=lambda each: not is_first_group(each[1].shape))
