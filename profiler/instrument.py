"""Follow the life of every storage while real code runs: who allocated it, when it dies.

`Meter` is a dispatch mode. It sees each operator below autograd, registers the storages that the
operator's results live on, and hears of a storage's death through a weak reference.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from estimator.components import Component
from profiler import float8, trace
from profiler.cuda_kernels import Kernels
from profiler.known_values import KnownValues
from profiler.places import NOWHERE, Place, Places
from profiler.workspaces import Workspaces

_READ: Final = torch.ops.aten._local_scalar_dense.default
_DEVICE: Final = torch.ops.prim.device.default
_COPY: Final = torch.ops.aten._to_copy.default
_ADD: Final = torch.ops.aten.add.Tensor
# What autograd's C++ code does in place on a tensor of its own, unless a tensor subclass or any
# dispatch mode is about: torch/csrc/autograd/input_buffer.cpp (`accumulate`) for the sum of
# gradients, FunctionsManual.cpp (`index_backward`, `gather_backward`,
# `value_selecting_reduction_backward`) for the others.
# With each, how many references at most the dispatcher and its caller hold on a tensor that is the
# engine's alone; found by counting, and held by a test against real memory events.
_IN_PLACE_TWINS: Final = {
    torch.ops.aten.add.Tensor: (torch.ops.aten.add_.Tensor, 4),
    torch.ops.aten.index_put.default: (torch.ops.aten.index_put_.default, 5),
    torch.ops.aten.scatter.src: (torch.ops.aten.scatter_.src, 5),
    torch.ops.aten.scatter_add.default: (torch.ops.aten.scatter_add_.default, 5),
}
_STORAGE_REFERENCES: Final = 2


class _Record:
    """One storage while its story is still being written."""

    __slots__ = ("bytes", "component", "dtype", "layer", "module", "operator", "phase", "shape")

    def __init__(
        self,
        *,
        size: int,
        dtype: str,
        shape: tuple[int, ...],
        phase: str,
        module: str,
        layer: int | None,
        operator: str,
        component: Component,
    ) -> None:
        self.bytes, self.dtype, self.shape = size, dtype, shape
        self.phase, self.module, self.layer = phase, module, layer
        self.operator, self.component = operator, component

    def freeze(self, site: str) -> trace.Storage:
        return trace.Storage(
            bytes=self.bytes,
            dtype=self.dtype,
            shape=self.shape,
            component=self.component,
            phase=self.phase,
            module=self.module,
            layer=self.layer,
            operator=self.operator,
            site=site,
        )


class Meter(TorchDispatchMode):  # type: ignore[misc]  # torch is not typed here
    """Record births and deaths of storages, in order.

    Args:
        layers: dotted path of the module list that holds the decoder layers, or None.
        workspaces: what kernels allocate inside themselves; None to count operators' results only.
        in_place_accumulation: undo the copy that autograd makes of summed gradients only because
            a dispatch mode is watching.
    """

    def __init__(
        self,
        *,
        layers: str | None = None,
        workspaces: Workspaces | None = None,
        in_place_accumulation: bool = True,
    ) -> None:
        super().__init__()
        self._places = Places(layers)
        self._workspaces = workspaces
        self._in_place = in_place_accumulation
        self._known = KnownValues()
        self._kernels = Kernels(self._on_host) if workspaces is not None else None
        self._host: set[int] = set()
        self._left_out: set[int] = set()
        self._records: list[_Record] = []
        self._events: list[trace.Event] = []
        self._deaths: dict[int, weakref.ref[Any]] = {}
        self._index: dict[int, int] = {}
        self._phase = trace.LOAD
        self._pass = ""
        self._loss_sequence: int | None = None
        self._parents: dict[int, tuple[int, ...]] = {}
        self._cublas: set[str] = set()
        self._sites: dict[str, str] = {}
        self._worked_for = NOWHERE
        self._making_batch = False
        self._updating = False
        self._steady_from = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Watch what compiled code does when it runs, and not how it is compiled."""
        return True

    def phase(self, name: str) -> None:
        """Begin a phase of the step."""
        if name in (trace.BATCH, trace.ESTIMATE_HESSIAN):
            self._pass = "Hessian " if name == trace.ESTIMATE_HESSIAN else ""
        if name == trace.ESTIMATE_HESSIAN:
            return
        self._places.layer = None
        self._worked_for = NOWHERE
        if name == trace.LOSS_FORWARD:
            self._loss_sequence = torch._C._autograd._get_sequence_nr()
        elif name == trace.FORWARD:
            self._loss_sequence = None
        elif name == trace.BACKWARD and self._loss_sequence is not None:
            # Autograd runs the newest node first: the loss comes before everything else.
            name = trace.LOSS_BACKWARD
        self._making_batch = name == trace.BATCH
        self._phase = trace.FORWARD if self._making_batch else name
        self._updating = name in trace.UPDATES

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Know that the optimizer works in the middle of another phase."""
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def begin_steady_step(self) -> None:
        """Mark the start of the step that is reported."""
        self._steady_from = len(self._events)

    def adopt(self, tensor: torch.Tensor, path: str, operator: str, component: Component) -> None:
        """Register a tensor that lived before tracing began, under the path of its owner."""
        self._register(tensor, operator, self._places.of_path(path), component)

    def own(self, tensor: torch.Tensor, parameter: torch.Tensor, component: Component) -> None:
        """Say that a storage is kept for a parameter, for as long as the optimizer lives."""
        index = self._index.get(tensor.untyped_storage()._cdata)
        if index is not None:
            place = self._places.of_parameter(parameter)
            record = self._records[index]
            record.component, record.layer = component, place.layer
            record.module = self._places.shown(place)

    def work_for(self, parameter: torch.Tensor) -> None:
        """Say for which parameter the optimizer works from here on."""
        self._worked_for = self._places.of_parameter(parameter)

    def mark(self, tensor: torch.Tensor, component: Component) -> None:
        """Say to which component a storage belongs, whatever it was taken for at birth."""
        index = self._index.get(tensor.untyped_storage()._cdata)
        if index is None:
            return
        pending = [index]
        while pending:
            index = pending.pop()
            self._records[index].component = component
            pending += self._parents.pop(index, ())

    def drop(self, tensor: torch.Tensor) -> None:
        """Forget a storage that lives in host memory."""
        index = self._index.pop(tensor.untyped_storage()._cdata, None)
        if index is not None:
            del self._deaths[index]
            self._records[index].bytes = 0

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Never register a storage in host memory that lives as long as the run."""
        self._left_out.add(tensor.untyped_storage()._cdata)

    def recorded(self) -> trace.Trace:
        """Return what was recorded; host tensors are left out."""
        kept = [index for index, record in enumerate(self._records) if record.bytes]
        renumbered = {index: new for new, index in enumerate(kept)}
        first = [
            event for event in self._events[: self._steady_from] if event.storage in renumbered
        ]
        second = [
            event for event in self._events[self._steady_from :] if event.storage in renumbered
        ]
        return trace.Trace(
            storages=tuple(self._frozen(self._records[index]) for index in kept),
            events=tuple(
                self._resolved(event, renumbered[event.storage])
                for event in (*_deaths_by_age(first), *_deaths_by_age(second))
            ),
            steady_from=len(first),
        )

    def _frozen(self, record: _Record) -> trace.Storage:
        if record.operator.startswith("cuBLAS"):
            return record.freeze("process")
        if record.layer is not None:
            return record.freeze("layer")
        if record.component == "buffers":
            return record.freeze("embeddings")
        for path, site in self._sites.items():
            if record.module == path or record.module.startswith(f"{path}."):
                return record.freeze(site)
        if record.phase in (trace.LOSS_FORWARD, trace.LOSS_BACKWARD):
            return record.freeze("loss")
        return record.freeze("optimizer" if record.phase in trace.UPDATES else "model")

    def _resolved(self, event: trace.Event, storage: int) -> trace.Event:
        layer = self._records[event.storage].layer if event.layer is None else event.layer
        return event._replace(storage=storage, layer=layer)

    @contextlib.contextmanager
    def watching(
        self, model: torch.nn.Module, sites: dict[str, str], *, hears: bool = True
    ) -> Iterator[None]:
        """Follow the modules of a model, and the gradients of its parameters.

        Args:
            model: the model, as the training step calls it.
            sites: what the modules outside the layers are called, by dotted path.
            hears: False for compiled code, in which modules neither start nor end.
        """
        self._sites = sites
        hooks = [
            parameter.register_hook(self._gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        try:
            with self._places.watching(model, hears=hears):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if float8.is_wrapped(types):
            return NotImplemented
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        place = self._place(args)
        self._places.layer = place.layer
        twin, references = _IN_PLACE_TWINS.get(func, (None, 0))
        if twin is not None and self._in_place and self._overwrites(args, kwargs, references):
            out = twin(*args)
        else:
            known = self._known.scalar(func, args)
            if known is not None:
                return known
            if self._updating and func is _READ:
                # An optimizer reads a norm, or compares it, to scale what it does anyway.
                known = KnownValues.constant(args[0])
                return args[0].dtype is torch.bool or 1.0 if known is None else known
            out = self._known.counted(func, args)
            if out is None:
                kernel = self._kernels.get(func) if self._kernels is not None else func
                out = kernel(*args, **kwargs)
                self._known.follow(func, args, kwargs, out)
        self._born(func, args, out, place)
        return out

    def _place(self, args: tuple[Any, ...]) -> Place:
        """Return for which module and layer an operator works."""
        if self._phase in trace.UPDATES:
            self._worked_for = self._owner_in_step(args)
            return self._worked_for
        if self._phase == trace.LOSS_BACKWARD and not self._in_loss():
            self._phase = trace.BACKWARD
        return self._places.now()

    def _in_loss(self) -> bool:
        """Whether the backward pass is still at what the loss function did."""
        node = torch._C._current_autograd_node()
        if node is None or self._loss_sequence is None:
            return True
        return bool(node._sequence_nr() >= self._loss_sequence)

    def _overwrites(self, args: tuple[Any, ...], kwargs: dict[str, Any], references: int) -> bool:
        """Whether autograd works here on a tensor that nobody else holds, and would overwrite it.

        The tests of `accumulate`: gradients are not recorded, the last reference is the engine's,
        and the tensor is dense. It tests for tensor subclasses first, and any active dispatch mode
        counts as one, so under this mode autograd always copies.
        """
        if kwargs or torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
            return False
        if self._updating:
            return False
        target, source = args[0], args[-1] if len(args) == 2 else args[0]
        if not (isinstance(target, torch.Tensor) and isinstance(source, torch.Tensor)):
            return False
        if target.shape != source.shape or target.dtype != source.dtype:
            return False
        return (
            _called_by_engine()
            and torch.ops.aten.is_non_overlapping_and_dense(target)
            and target._use_count() <= references
            and torch._C._storage_Use_Count(target.untyped_storage()._cdata) == _STORAGE_REFERENCES
        )

    def _born(self, func: Any, args: tuple[Any, ...], out: Any, place: Place) -> None:
        """Register the storages of an operator's results, and the kernel's own workspaces."""
        updating = self._updating
        inputs = _tensor_list(args)
        for position, tensor in enumerate(_tensors(out)):
            if tensor.untyped_storage()._cdata in self._index:
                continue
            if updating and position < len(inputs):
                place = self._owner_of(inputs[position]) or NOWHERE
            component: Component = "buffers" if self._making_batch else "activations"
            if updating:
                component = "gradients" if self._copies_gradient(func, args) else "workspace"
            self._register(tensor, str(func), place, component)
        if func is _ADD and not torch.is_grad_enabled():
            self._remember_parents(args, out)
        if self._workspaces is not None:
            self._transients(self._workspaces.of(func, args, out), place)
            self._cublas_workspace(func)

    def _owner_in_step(self, args: tuple[Any, ...]) -> Place:
        """Return for which module and layer the optimizer works.

        An operator on one tensor works for that tensor's owner, one on lists for nobody in
        particular, and one that makes a tensor of nothing for whoever was worked for before.
        """
        if _tensor_list(args):
            return NOWHERE
        return (self._owner_of(args[0]) if args else None) or self._worked_for

    def _owner_of(self, value: Any) -> Place | None:
        """Return the module and the layer of a registered tensor."""
        if not isinstance(value, torch.Tensor):
            return None
        index = self._index.get(value.untyped_storage()._cdata)
        if index is None:
            return None
        return Place(self._records[index].module, self._records[index].layer)

    def _copies_gradient(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an optimizer makes a copy of a gradient in another type, to step with it."""
        if func is not _COPY:
            return False
        index = self._index.get(args[0].untyped_storage()._cdata)
        return index is not None and self._records[index].component == "gradients"

    def _remember_parents(self, args: tuple[Any, ...], out: Any) -> None:
        """A sum of gradients that becomes `.grad` makes gradients of what was summed."""
        child = self._index.get(out.untyped_storage()._cdata)
        parents = [
            self._index.get(value.untyped_storage()._cdata)
            for value in args
            if isinstance(value, torch.Tensor)
        ]
        if child is not None:
            self._parents[child] = tuple(
                index for index in parents if index is not None and index != child
            )

    def _register(
        self,
        tensor: torch.Tensor,
        operator: str,
        place: Place,
        component: Component,
    ) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if storage._cdata in self._left_out:
            return
        if storage._cdata in self._host:
            # Addresses are used again, so a host tensor is known only until it is seen.
            self._host.discard(storage._cdata)
            return
        if size == 0 or storage._cdata in self._index:
            return
        index = len(self._records)
        self._records.append(
            _Record(
                size=size,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                phase=self._phase,
                module=self._places.shown(place),
                layer=place.layer,
                operator=operator.removesuffix(".default"),
                component=component,
            )
        )
        self._index[storage._cdata] = index
        key = storage._cdata

        def died(_: Any) -> None:
            self._index.pop(key, None)
            if self._deaths.pop(index, None) is not None:
                self._record_event(index, is_alloc=False)

        self._deaths[index] = weakref.ref(storage, died)
        self._record_event(index, is_alloc=True)

    def _record_event(self, index: int, *, is_alloc: bool) -> None:
        # What an update makes belongs to a parameter, which may be learnt only after the birth; the
        # place is still that of the last layer that ran backward.
        layer = None if self._phase in trace.UPDATES else self._places.layer
        self._events.append(trace.Event(index, is_alloc, self._pass + self._phase, layer))

    def _transients(self, buffers: Iterable[tuple[str, int]], place: Place) -> None:
        """Record the buffers that a kernel takes together and gives back before it returns."""
        born = []
        for operator, size in buffers:
            born.append(len(self._records))
            self._records.append(self._workspace(operator, size, place))
            self._record_event(born[-1], is_alloc=True)
        for index in born:
            self._record_event(index, is_alloc=False)

    def _workspace(self, operator: str, size: int, place: Place) -> _Record:
        return _Record(
            size=size,
            dtype="uint8",
            shape=(size,),
            phase=self._phase,
            module=self._places.shown(place),
            layer=place.layer,
            operator=operator,
            component="workspace",
        )

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Leave a result out of the count: CUDA's kernel puts it into host memory."""
        self._host.add(tensor.untyped_storage()._cdata)
        return tensor

    def _cublas_workspace(self, func: Any) -> None:
        """Record cuBLAS's workspace at the first product of the main and the backward thread."""
        assert self._workspaces is not None
        thread = "backward" if torch._C._current_graph_task_id() >= 0 else "main"
        if thread in self._cublas or not self._workspaces.is_matmul(func):
            return
        self._cublas.add(thread)
        index = len(self._records)
        handle = f"cuBLAS handle of the {thread} thread"
        self._records.append(self._workspace(handle, self._workspaces.cublas_bytes, NOWHERE))
        self._events.append(trace.Event(index, True, self._pass + self._phase, None))

    def _gradient(self, gradient: torch.Tensor) -> None:
        self.mark(gradient, "gradients")


def _deaths_by_age(events: list[trace.Event]) -> Iterator[trace.Event]:
    """Put deaths that nothing separates in the order of birth.

    Some die together in an order that depends on addresses: autocast's cache of weights is a hash
    table. What is free after all of them does not depend on the order; the document must not.
    """
    for (is_alloc, *_), group in groupby(
        events, key=lambda event: (event.is_alloc, event.phase, event.layer)
    ):
        together = list(group)
        yield from together if is_alloc else sorted(together)


def _called_by_engine() -> bool:
    """Whether the operator was called by C++ autograd itself, not by a Python backward."""
    frame = sys._getframe(3)
    for _ in range(6):
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        if frame.f_code.co_name in ("backward", "apply"):
            return False
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _tensor_list(args: tuple[Any, ...]) -> list[Any]:
    """Return the tensors of an operator that takes a list of them; of another one, nothing."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in first):
        return list(first)
    return []


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for item in out:
            yield from _tensors(item)
