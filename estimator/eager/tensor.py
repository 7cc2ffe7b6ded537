"""Symbolic tensors whose storage lives exactly as long as something refers to it.

Eager PyTorch frees a tensor's memory when the last reference to it goes: a local variable of a
forward function, a saved tensor of the backward graph, a buffer of the backward engine. CPython
counts references the same way, so a `Storage` here reports its own birth and death.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

from msgspec import Struct

from estimator.components import Component
from estimator.dtypes import DType
from estimator.eager.size import MONOMIALS, Polynomial, Shape, elements
from estimator.sources import Assumption, Cite


class TensorKind(NamedTuple):
    """What all tensors of one kind share: the identity of a ledger row."""

    component: Component
    site: int
    name: str
    dtype: DType
    shape: Shape
    source: Cite | Assumption

    @property
    def size(self) -> tuple[int, int]:
        """Bytes of one such tensor: (coefficient, index of its monomial)."""
        count, monomial = elements(self.shape)
        return count * self.dtype.width, monomial


Rule = Callable[..., "tuple[Tensor | None, ...]"]
ENGINE: Final = Cite("torch-autograd", "engine.cpp, one gradient per input of a node")
ACTIVATIONS: Final[Component] = "activations"
GRADIENTS: Final[Component] = "gradients"

Live = dict[int, int]
"""Number of living tensors of each kind, by the kind's index in `Tape.kinds`."""


class Instant(NamedTuple):
    """A local maximum of the live bytes: where in the step it lies, what is alive, its sum."""

    site: int
    phase: str
    live: Live
    total: Polynomial


class Storage:
    """The memory behind one or more tensors."""

    __slots__ = ("kind", "serial", "tape")

    def __init__(self, tape: Tape, kind: int) -> None:
        self.tape = tape
        self.kind = kind
        self.serial = tape.born(kind)

    def __del__(self) -> None:
        self.tape.died(self.kind, self.serial)


class Tensor:
    """A shape, an element type, a storage, and the place in the backward graph."""

    __slots__ = ("base", "dtype", "edge", "shape", "storage", "tape")

    def __init__(
        self,
        tape: Tape,
        shape: Shape,
        dtype: DType,
        storage: Storage | None,
        edge: Edge | None = None,
        base: Tensor | None = None,
    ) -> None:
        self.tape = tape
        self.shape = shape
        self.dtype = dtype
        self.storage = storage
        self.edge = edge
        # A view keeps its base alive, as torch's view tracking does.
        self.base = base

    @property
    def requires_grad(self) -> bool:
        """Whether backward will want a gradient for this tensor."""
        return self.edge is not None


class Param(Struct, eq=False):
    """A parameter: persistent, so it has no storage here; the ledger lists it as weights.

    Args:
        held: an activation that was made a leaf, which the graph keeps alive as its leaf.
        keeps_gradient: no optimizer has it, so that its gradient is there from the first step on.
    """

    name: str
    shape: Shape
    dtype: DType
    requires_grad: bool
    held: Tensor | None = None
    keeps_gradient: bool = False

    def __hash__(self) -> int:
        return id(self)


class Leaf(Param, eq=False):
    """An input of a recomputed region, where a backward inside the backward ends.

    Args:
        grad: what has arrived there.
    """

    grad: Tensor | None = None


class Update(Protocol):
    """An optimizer that works inside backward."""

    def accumulate(self, tape: Tape, param: Param, gradient: list[Tensor]) -> None:
        """Take a parameter's gradient, the only reference to it."""
        ...

    def finish(self, tape: Tape) -> None:
        """Do what is left when backward has ended."""
        ...


class Node:
    """One operator of the backward graph: what it saved and how it makes gradients."""

    __slots__ = ("inputs", "metas", "name", "order", "outputs", "rule", "saved", "site", "tape")

    def __init__(
        self,
        tape: Tape,
        name: str,
        inputs: tuple[Edge | None, ...],
        metas: tuple[tuple[Shape, DType] | None, ...],
        saved: list[Any],
        rule: Rule,
        outputs: int,
    ) -> None:
        self.tape = tape
        self.name = name
        self.order = tape.next_order()
        self.site = tape.site
        self.inputs = inputs
        self.metas = metas
        self.saved = saved
        self.rule = rule
        self.outputs = outputs

    def wants(self, number: int) -> bool:
        """Whether input `number` wants a gradient."""
        return self.inputs[number] is not None

    def meta_of(self, number: int) -> tuple[Shape, DType]:
        """Return the shape and type of input `number`."""
        meta = self.metas[number]
        if meta is None:
            raise ValueError(f"{self.name} has no input {number}")
        return meta

    def new_grad(
        self,
        number: int,
        shape: Shape | None = None,
        dtype: DType | None = None,
        source: Cite = ENGINE,
    ) -> Tensor:
        """Allocate the gradient of input `number`, of that input's shape and type by default.

        What is already the gradient of a parameter, shape and type, is counted as such; anything
        else is an activation gradient on its way.
        """
        edge, meta = self.inputs[number], self.meta_of(number)
        if edge is None:
            raise ValueError(f"{self.name}: input {number} wants no gradient")
        final = (shape or meta[0]) == meta[0] and (dtype or meta[1]) is meta[1]
        if final and isinstance(edge.target, Param):
            name, component = f"{edge.target.name}.grad", GRADIENTS
        else:
            name, component = f"{self.name}, backward", ACTIVATIONS
        out_shape, out_dtype = shape or meta[0], dtype or meta[1]
        kind = TensorKind(component, self.tape.site, name, out_dtype, out_shape, source)
        return Tensor(self.tape, out_shape, out_dtype, Storage(self.tape, self.tape.kind(kind)))

    def scratch(
        self,
        name: str,
        shape: Shape,
        dtype: DType,
        source: Cite | Assumption = ENGINE,
        component: Component = ACTIVATIONS,
    ) -> Tensor:
        """Allocate a temporary of this node's backward."""
        kind = TensorKind(
            component, self.tape.site, f"{self.name}, backward: {name}", dtype, shape, source
        )
        return Tensor(self.tape, shape, dtype, Storage(self.tape, self.tape.kind(kind)))


class Edge(NamedTuple):
    """Where a gradient goes: an output of a node, or a parameter."""

    target: Node | Param
    output: int = 0


class Regime(NamedTuple):
    """Switches that kernels take by size; between two of them every size is a polynomial.

    Args:
        sorts_embedding_gradient: more than 3072 tokens in the micro-batch.
        dequantizes: more tokens than the packed weights' library multiplies without dequantizing.
        exceeds_window: the length is beyond the sliding window of some layers.
        several_rows: more than one sequence, so that batched products copy what lies by token.
        loss_rows: tokens in one chunk of a fused loss; None where one chunk holds them all.
        aligned_tokens: the tokens of the micro-batch are a multiple of 16.
    """

    sorts_embedding_gradient: bool = True
    dequantizes: bool = True
    exceeds_window: bool = False
    several_rows: bool = True
    loss_rows: int | None = None
    aligned_tokens: bool = True


class Tape:
    """The running account of one symbolic training step."""

    def __init__(self, autocast: DType | None = None, regime: Regime | None = None) -> None:
        self.regime = regime or Regime()
        self.kinds: list[TensorKind] = []
        self._sizes: list[tuple[int, int]] = []
        self._total = [0] * len(MONOMIALS)
        self._index: dict[TensorKind, int] = {}
        self.live: Live = {}
        self._instants: dict[tuple[str, int], list[Instant]] = {}
        self.site = 0
        self.phase = "forward"
        self.prefix = ""
        self.autocast = autocast
        self.autocast_enabled = False
        self.cast_cache: dict[Param, Tensor] = {}
        # False for a compiled graph: autocast keeps no casts while it is traced.
        self.caches_casts = True
        self.frame: Any = None
        self.products: Any = None
        self.recording = True
        self.host: dict[tuple[int, tuple[int, int]], int] = {}
        self.grads: dict[Param, Tensor] = {}
        self.batch: list[Tensor] = []
        # What a loop of one's own has names for: until the next step, or from the one before.
        self.names: list[Tensor] = []
        self.names_before: list[Tensor] = []
        self.grads_exist = False
        # In the first step also the gradients are made that no optimizer clears ever after.
        self.first_step = False
        self.kept: dict[Param, Tensor] = {}
        # A compiled backward hands out all gradients when it ends; until then they are kept here.
        self.gathers_gradients = False
        self.results: list[Tensor] = []
        # False while the model only evaluates: no graph is built, and dropout is off.
        self.trains = True
        # What the optimizer does to a parameter as soon as its gradient is there, if it does.
        self.update: Update | None = None
        self.left_behind: Live | None = None
        # What is alive when backward turns to the loss and the layers, where a term of the loss
        # has its backward before them.
        self.reached: Live | None = None
        self._grown = False
        self._order = 0

    # -- accounts ---------------------------------------------------------------------------

    def born(self, kind: int) -> int:
        """Count one more living tensor of a kind; the number returned names it at its death."""
        self.live[kind] = self.live.get(kind, 0) + 1
        coefficient, monomial = self._sizes[kind]
        self._total[monomial] += coefficient
        self._grown = True
        return 0

    def died(self, kind: int, serial: int) -> None:
        """Count one tensor less; what was alive just before was a local maximum if it had grown."""
        if self._grown:
            self.mark()
        left = self.live[kind] - 1
        if left:
            self.live[kind] = left
        else:
            del self.live[kind]
        coefficient, monomial = self._sizes[kind]
        self._total[monomial] -= coefficient

    def enter(self, site: int) -> None:
        """Go to another site of the step; what has grown so far belongs to the one before."""
        if site != self.site:
            if self._grown:
                self.mark()
            if site == 0 and self.phase == "backward":
                self.left_behind = dict(self.live)
            self.site = site

    def mark(self) -> None:
        """Record what is alive now, unless an instant of the same place is nowhere below it."""
        self._grown = False
        here = self._instants.setdefault((self.phase, self.site), [])
        a0, a1, a2, a3, a4, a5, a6, a7 = self._total
        keep = []
        for each in here:
            b0, b1, b2, b3, b4, b5, b6, b7 = each.total
            if (
                b3 >= a3
                and b0 >= a0
                and b5 >= a5
                and b4 >= a4
                and b2 >= a2
                and b1 >= a1
                and b6 >= a6
                and b7 >= a7
            ):
                return
            if not (
                a3 >= b3
                and a0 >= b0
                and a5 >= b5
                and a4 >= b4
                and a2 >= b2
                and a1 >= b1
                and a6 >= b6
                and a7 >= b7
            ):
                keep.append(each)
        total = (a0, a1, a2, a3, a4, a5, a6, a7)
        here[:] = [*keep, Instant(self.site, self.phase, dict(self.live), total)]

    def instants(self, phase: str) -> Iterator[tuple[int, list[Instant]]]:
        """Yield for each site of a phase its instants, in the order of time."""
        for (when, site), found in self._instants.items():
            if when == phase and found:
                yield site, found

    def kind(self, kind: TensorKind) -> int:
        """Return the index of a kind, giving it one when it is new."""
        index = self._index.get(kind)
        if index is None:
            index = self._index[kind] = len(self.kinds)
            self.kinds.append(kind)
            self._sizes.append(kind.size)
        return index

    def new(
        self,
        name: str,
        shape: Shape,
        dtype: DType,
        source: Cite | Assumption,
        component: Component = "activations",
        site: int | None = None,
    ) -> Tensor:
        """Allocate a tensor; `name` is put behind the current module's path.

        Args:
            site: what it counts for, where that is not the site that is being worked on.
        """
        out = Tensor(self, shape, dtype, None)
        self.allocate(out, name, source, component, site)
        return out

    def allocate(
        self,
        tensor: Tensor,
        name: str,
        source: Cite | Assumption,
        component: Component = "activations",
        site: int | None = None,
    ) -> None:
        """Give a tensor its storage."""
        place = self.site if site is None else site
        kind = TensorKind(component, place, self.prefix + name, tensor.dtype, tensor.shape, source)
        tensor.storage = Storage(self, self.kind(kind))

    def result(self, operator: str, tensor: Tensor, name: str, source: Cite | Assumption) -> None:
        """Give the result of a product or of attention its storage.

        A region that keeps such results hands its recomputation the one that it has kept.
        """
        if self.products is None or not self.products.takes(operator, tensor):
            self.allocate(tensor, name, source)
            if self.products is not None:
                self.products.keep(operator, tensor)
        if operator != "attention":
            self.multiplied(tensor)

    def multiplied(self, tensor: Tensor) -> None:
        """Hear of the result of a product: with the first one, cuBLAS asks for its workspace."""

    def on_host(self, shape: Shape, dtype: DType) -> None:
        """Count a tensor that is copied to pinned host memory, by site and size."""
        count, monomial = elements(shape)
        key = (self.site, (count * dtype.width, monomial))
        self.host[key] = self.host.get(key, 0) + 1

    @contextmanager
    def module(self, name: str) -> Iterator[None]:
        """Name what is allocated inside after a module."""
        outer, self.prefix = self.prefix, f"{self.prefix}{name}."
        try:
            yield
        finally:
            self.prefix = outer

    def drop_step(self) -> None:
        """Let go of the gradients and the batch that the step has left."""
        self.grads.clear()
        self.kept.clear()
        self.batch.clear()
        self.names.clear()

    # -- graph ------------------------------------------------------------------------------

    def next_order(self) -> int:
        """Return the next sequence number; backward runs the newest ready node first."""
        self._order += 1
        return self._order

    def record(
        self,
        name: str,
        inputs: tuple[Tensor | Param | None, ...],
        saved: tuple[Tensor | Param | None, ...],
        rule: Rule,
        *outputs: Tensor,
    ) -> None:
        """Hang a node behind `outputs`, unless no input wants a gradient.

        Args:
            name: the operator, for the rows of its backward.
            inputs: the differentiable inputs in the order in which `rule` returns gradients.
            saved: what the operator keeps for backward; a parameter costs nothing, and None is
                kept as None so that `rule` finds its tensors by position.
            rule: `rule(node, grads, saved)` returns one gradient for each input, None where the
                input wants none; `grads` holds one gradient (or None) for each output. It must not
                close over a tensor: the graph would keep that tensor alive.
        """
        if not self.trains:
            return
        # Lists first: this runs for every operator, and a generator costs more than its items.
        edges = tuple([_edge(each) for each in inputs])
        if not self.recording or not any(edges):
            return
        metas = tuple([None if each is None else (each.shape, each.dtype) for each in inputs])
        frame = self.frame
        if frame is None:
            packed = list(saved)
        else:
            # torch calls its hooks for weights too (torch-autograd, saved_variable.cpp).
            packed = [
                frame.pack(each) if isinstance(each, (Tensor, Param)) else each for each in saved
            ]
        node = Node(self, self.prefix + name, edges, metas, packed, rule, len(outputs))
        for number, output in enumerate(outputs):
            output.edge = Edge(node, number)


def _edge(source: Tensor | Param | None) -> Edge | None:
    if isinstance(source, Tensor):
        return source.edge
    return Edge(source) if source is not None and source.requires_grad else None


def view(tensor: Tensor, shape: Shape) -> Tensor:
    """Return another shape of the same storage, with a node of its own as torch gives views."""
    out = Tensor(tensor.tape, shape, tensor.dtype, tensor.storage, base=tensor.base or tensor)
    before = tensor.shape

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        (grad,) = grads
        return (reshaped(grad, before),)

    tensor.tape.record("view", (tensor,), (), rule, out)
    return out


def reshaped(grad: Tensor, shape: Shape) -> Tensor:
    """Return a view of a gradient; it refers to its base, so it is not summed into in place."""
    return Tensor(grad.tape, shape, grad.dtype, grad.storage, base=grad.base or grad)


Event = tuple[int, "int | None"]
"""A tensor's number, and its kind where it is allocated or None where it is freed."""


class Section(NamedTuple):
    """What is allocated and freed from the first allocation at a place of the step to the next."""

    phase: str
    site: int
    events: tuple[Event, ...]


class RecordingTape(Tape):
    """A tape that keeps every birth and death in order, for the allocator to replay.

    It counts nothing, and so knows no instants.
    """

    def __init__(self, autocast: DType | None = None, regime: Regime | None = None) -> None:
        super().__init__(autocast, regime)
        self._serial = 0
        self._place: tuple[str, int] | None = None
        self._events: list[Event] = []
        self._log: list[tuple[str, int, list[Event]]] = []
        self.first_product: int | None = None

    def born(self, kind: int) -> int:
        if self._place != (self.phase, self.site):
            self._place = (self.phase, self.site)
            self._events = []
            self._log.append((self.phase, self.site, self._events))
        self._serial += 1
        self._events.append((self._serial, kind))
        return self._serial

    def died(self, kind: int, serial: int) -> None:
        self._events.append((serial, None))

    def multiplied(self, tensor: Tensor) -> None:
        if self.first_product is None and tensor.storage is not None:
            self.first_product = tensor.storage.serial

    def sections(self) -> tuple[Section, ...]:
        """Return what has happened so far."""
        # Metrics are made before backward, at the end of forward.
        return tuple(
            Section("forward" if phase == "metrics" else phase, site, tuple(events))
            for phase, site, events in self._log
        )
