"""The optimizer inside backward: parameters are updated while gradients are still being made."""

from __future__ import annotations

from estimator.dtypes import DType
from estimator.eager.size import dim, elements
from estimator.eager.tensor import Param, Storage, Tape, Tensor, TensorKind
from estimator.memory.standing import trained_tensors
from estimator.run import Run
from estimator.techniques.optimizers import OPTIMIZERS, Trained, cpu_offload, temporaries
from estimator.techniques.optimizers.row import layout


class InBackward:
    """A hook that updates each parameter as soon as its gradient is there.

    Source: torch-autograd, functions/accumulate_grad.cpp, AccumulateGrad::apply.
    """

    def __init__(self, run: Run) -> None:
        self.choice = run.optimizer
        self.source = OPTIMIZERS[self.choice.name].source
        self.tables = {module.name for module in run.spec.embeddings}
        self.linears = {each.name for each in trained_tensors(run) if each.in_linear}
        self.layout = layout(run)
        self.known: dict[Param, tuple[int, ...]] = {}

    def accumulate(self, tape: Tape, param: Param, gradient: list[Tensor]) -> None:
        """Take the only reference to the gradient of a parameter."""
        self.step(tape, param, gradient)
        gradient.clear()

    def finish(self, tape: Tape) -> None:
        """Do what is left when backward has ended."""

    def step(self, tape: Tape, param: Param, gradient: list[Tensor]) -> list[Storage]:
        """Allocate the temporaries of a step over one parameter."""
        return [self._scratch(tape, param, size) for size in self._sizes(param)]

    def _sizes(self, param: Param) -> tuple[int, ...]:
        if param not in self.known:
            self.known[param] = temporaries(self.choice, (self._trained(param),))
        return self.known[param]

    def _trained(self, param: Param) -> Trained:
        rows, columns = (0, 0)
        if len(param.shape) >= 2:
            rows, columns = param.shape[-2].value, param.shape[-1].value
        return Trained(
            name=param.name,
            elements=elements(param.shape)[0],
            dtype=param.dtype,
            rows=rows,
            columns=columns,
            keeps_32bit=self.layout.tables_in_32bit
            and param.name.rpartition(".")[0] in self.tables,
            count=1,
            in_linear=param.name in self.linears,
            in_body=not self.layout.is_outer(param.name),
            head_elements=self.layout.head_elements,
        )

    def _scratch(self, tape: Tape, param: Param, size: int) -> Storage:
        name = f"{param.name}: temporaries of the step in backward"
        shape = (dim("bytes", size),)
        kind = TensorKind("optimizer_states", tape.site, name, DType.UINT8, shape, self.source)
        return Storage(tape, tape.kind(kind))


class FusedBackward(InBackward):
    """A hook that updates the parameter before: its own gradient is not in place yet.

    A half-precision gradient is dropped when its fp32 copy, the first temporary, has been made.

    Source: lomo-optim, lomo.py, Lomo.fuse_update and Lomo.fused_backward.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.before: tuple[Param, list[Tensor]] | None = None

    def accumulate(self, tape: Tape, param: Param, gradient: list[Tensor]) -> None:
        """Update the parameter before this one, and keep this one's gradient."""
        self.finish(tape)
        self.before = (param, [gradient.pop()])

    def finish(self, tape: Tape) -> None:
        """Update the parameter whose gradient has been kept."""
        if self.before is not None:
            self.step(tape, *self.before)
            self.before = None

    def step(self, tape: Tape, param: Param, gradient: list[Tensor]) -> list[Storage]:
        """Allocate the copy of the gradient first, and the rest when the gradient is gone."""
        sizes = self._sizes(param)
        alive = [self._scratch(tape, param, size) for size in sizes[:1]]
        if param.dtype.is_half:
            gradient.clear()
        alive += [self._scratch(tape, param, size) for size in sizes[1:]]
        return alive


class MainGradients:
    """A hook that adds each gradient to its fp32 place and drops it.

    Source: megatron-ddp, core/distributed/distributed_data_parallel.py,
    _make_backward_post_hook, without gradient_accumulation_fusion.
    """

    def accumulate(self, tape: Tape, param: Param, gradient: list[Tensor]) -> None:
        """Take the only reference to the gradient of a parameter, and drop it."""
        gradient.clear()

    def finish(self, tape: Tape) -> None:
        """Do nothing: every gradient has been added."""


class OnHost:
    """A hook that drops a gradient once it is on its way to the host; small ones stay.

    Source: torchao, optim/cpu_offload.py, CPUOffloadOptimizer (backward_hook).
    """

    def __init__(self, run: Run) -> None:
        self.choice = run.optimizer

    def accumulate(self, tape: Tape, param: Param, gradient: list[Tensor]) -> None:
        """Drop the only reference to a gradient that is copied; the step finds the others."""
        if cpu_offload.moves(self.choice, elements(param.shape)[0]):
            gradient.clear()
        else:
            tape.grads[param] = gradient.pop()

    def finish(self, tape: Tape) -> None:
        """Do nothing: every gradient has been copied or stays."""


def inside_backward(run: Run) -> InBackward | MainGradients | OnHost | None:
    """Return the hook of a run that uses gradients up inside backward."""
    if run.optimizer.main_gradients:
        return MainGradients()
    if not run.optimizer.in_backward:
        return None
    if run.optimizer.asked.offload_gradients:
        return OnHost(run)
    return FusedBackward(run) if OPTIMIZERS[run.optimizer.name].fused_backward else InBackward(run)
