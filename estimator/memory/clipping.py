"""What `clip_grad_norm_` holds: the norm of each gradient, and their partial sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from estimator.memory.ledger import Entry, constant_row
from estimator.memory.standing import step_gradients, tensors_with_gradients
from estimator.run import OptimizerChoice, Run
from estimator.sources import Cite
from estimator.techniques.optimizers.row import FP32, Trained
from estimator.techniques.optimizers.temporaries import Scratch, Step, by_dtype, worst_moment

# One block of the kernel reduces this many elements to one partial sum.
CHUNK: Final = 65536
_NORM: Final = Cite("torch-foreach-norm", "foreach_tensor_norm_cuda, output_per_tensor")


def clipping_entries(run: Run) -> tuple[Entry, ...]:
    """Return what clipping holds beside the standing entries at its worst moment."""
    sizes = clipping_temporaries(run)
    if not sizes:
        return ()
    scratch = [
        Entry(
            constant_row(
                "norms of gradients and their partial sums", "workspace", "optimizer", size,
                f"{size} B", _NORM,
            ),
            count,
        )
        for size, count in Counter(sizes).items()
    ]  # fmt: skip
    return (*step_gradients(run), *scratch)


def clipping_temporaries(run: Run) -> tuple[int, ...]:
    """Return the sizes of what clipping allocates at its worst moment [bytes].

    The Trainer, and most loops, hand it the model's parameters and not the optimizer's.

    Source: hf-trainer, Trainer._clip_grad_norm.
    """
    if not run.clips:
        return ()
    return worst_moment(_total_norm, (tensors_with_gradients(run),), run.optimizer).worst


def _total_norm(step: Step, tensors: tuple[Trained, ...], choice: OptimizerChoice) -> None:
    """Reduce the gradients of each type, then all the norms; what follows are single numbers.

    Source: torch-clip, _get_total_norm.
    """
    norms = [_norms(step, group) for group in by_dtype(tensors)]
    widest = max(each.dtype.width for each in tensors)
    stacked = step.new(widest * _number(tensors))
    step.new(widest, held=(norms, stacked))


def _norms(step: Step, tensors: tuple[Trained, ...]) -> Scratch:
    """Return one number for each tensor; the partial sums last as long as the kernel.

    Shapes:
        norm of each gradient    []      as the gradients
        partial sums             [n, c]  fp32: n tensors, c chunks of the largest of them

    Source: torch-foreach-norm, foreach_tensor_norm_cuda.
    """
    number = _number(tensors)
    chunks = max(-(-each.elements // CHUNK) for each in tensors)
    partial = step.new(number * chunks * FP32)
    return step.new(*(tensors[0].dtype.width for _ in range(number)), held=partial)


def _number(tensors: Iterable[Trained]) -> int:
    return sum(each.count for each in tensors)
