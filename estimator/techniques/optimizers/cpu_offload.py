"""torchao's optimizer in host memory: the update runs on the CPU, over pinned copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from estimator.run import OptimizerChoice, Run
from estimator.sources import Cite
from estimator.techniques.optimizers.row import OptimizerRow, State, Trained, same, scalar
from estimator.techniques.optimizers.temporaries import nothing

if TYPE_CHECKING:
    from estimator.request import EstimateRequest

NAME: Final = "torchao_cpu_offload"
_SOURCE: Final = Cite("torchao", "optim/cpu_offload.py, CPUOffloadOptimizer")
_STATES: Final = (("exp_avg", same), ("exp_avg_sq", same), ("step", scalar))
_NOTE: Final = (
    "torchao copies each gradient to the host before the loop clips the norm, so that clipping "
    "does not reach the weights that are updated there"
)


def moves(choice: OptimizerChoice, elements: int) -> bool:
    """Whether a tensor of so many parameters is updated in host memory.

    Source: torchao, optim/cpu_offload.py, CPUOffloadOptimizer (minimal_size).
    """
    return choice.name == NAME and elements >= choice.asked.minimal_size


def host_bytes(run: Run, tensors: tuple[Trained, ...]) -> int:
    """Bytes in host memory from the second step on.

    Shapes:
        weight and gradient    as the weight, pinned, in blocks of a power of two
        exp_avg and exp_avg_sq as the weight, pageable
        step                   []  fp32

    Source: torchao, optim/cpu_offload.py, CPUOffloadOptimizer.
    """
    return sum(
        each.count * (2 * _pinned(each.bytes) + sum(size(each) for _, size in _STATES))
        for each in tensors
        if moves(run.optimizer, each.elements)
    )


def late_bytes(run: Run, tensors: tuple[Trained, ...]) -> int:
    """Bytes of dropped gradients whose blocks may wait for their copies, all at once.

    `record_stream` keeps a freed block from being used again until the copy has ended; how far
    copies fall behind depends on the link. It is no longer among the allocated bytes, and an
    allocation that would fail waits for the copies first.

    Source: torchao, optim/cpu_offload.py, CPUOffloadOptimizer (backward_hook).
    """
    if not run.optimizer.asked.offload_gradients:
        return 0
    return sum(each.count * each.bytes for each in tensors if moves(run.optimizer, each.elements))


def refusals(request: EstimateRequest) -> Iterator[tuple[str, bool]]:
    """Yield what this optimizer was not compared with, or does not run with."""
    if request.optimizer.name != NAME:
        return
    beside = f"optimizer {NAME!r} with "
    method, scaled = request.method, request.precision == "amp_fp16" or request.autocast == "fp16"
    yield f"{beside}optimizer.in_backward (use offload_gradients)", request.optimizer.in_backward
    yield f"{beside}loop.set_to_none=false, which it asserts against,", not request.loop.set_to_none
    yield f"{beside}fp16 autocast, whose scaled gradients it copies (use bf16),", scaled
    yield f"{beside}method {method.name!r} (use 'full' or 'lora')", method.name not in _METHODS
    yield f"{beside}kernels {list(request.kernels)}", bool(request.kernels)
    yield f"{beside}fp8", request.fp8 is not None
    yield f"{beside}qat", request.qat is not None
    own = request.software.framework not in ("transformers", "trl")
    yield f"{beside}software {request.software.framework!r} (use 'transformers')", own


_METHODS: Final = ("full", "lora")


def _pinned(size: int) -> int:
    """Bytes of the block for a pinned tensor.

    Source: torch-pinned, CachingHostAllocatorImpl::allocate, PowerOf2Ceil.
    """
    return 1 << (size - 1).bit_length()


def _states(choice: OptimizerChoice) -> tuple[State, ...]:
    """Return what stays on the device: the states of AdamW for the smallest tensors."""

    def left(size: Callable[[Trained], int]) -> Callable[[Trained], int]:
        return lambda each: 0 if moves(choice, each.elements) else size(each)

    return tuple(State(name, left(size), _SOURCE) for name, size in _STATES)


CPU_OFFLOAD: Final[dict[str, OptimizerRow]] = {
    NAME: OptimizerRow(
        _states,
        {"fused": nothing},
        "fused",
        _SOURCE,
        knobs=("offload_gradients", "minimal_size"),
        note=_NOTE,
        not_with=("master_bf16", "megatron_bf16"),
    ),
}
