"""LoReFT: a low-rank edit of a few positions of the hidden states between layers."""

import re
from typing import Annotated, Any, ClassVar, Final

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import BATCH, ONE, Dim, Shape, dim
from estimator.eager.tensor import Node, Param, Tape, Tensor
from estimator.errors import InvalidRequestError
from estimator.model.spec import Buffer, LayerKind, Module, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method, by_layer

_INTERVENTION: Final = Cite("pyreft", "interventions.py, LoreftIntervention")
_ORTHOGONAL: Final = Cite("torch-parametrizations", "_Orthogonal.forward, householder")
_HOUSEHOLDER: Final = Cite("torch-autograd", "FunctionsManual.cpp, householder_product_backward")
_GATHER: Final = Cite("pyvene", "models/modeling_utils.py, gather_neurons")
_SCATTER: Final = Cite("pyvene", "models/modeling_utils.py, scatter_neurons")
_POSITIONS: Final = re.compile(r"(?:f(\d{1,6}))?\+?(?:l(\d{1,6}))?")


class Intervention(Module, frozen=True, eq=False, kw_only=True):
    """One intervention on the output of a layer: `h + R^T (W h + b - R h)` at some positions.

    Args:
        width: of the hidden states.
        rank: rows of R and W.
        positions: places of a sequence that it edits.
    """

    width: Dim
    rank: Dim
    positions: Dim
    dropout: float

    def weights(self) -> tuple[Weight, ...]:
        """Return W and b in the type of the model, and what R is made from, in fp32.

        Shapes:
            learned_source  [r, h] and [r]
            rotate_layer    [h, r]  4 bytes

        Source: pyreft, interventions.py, LoreftIntervention.__init__.
        """
        shapes: tuple[tuple[str, Shape, DType], ...] = (
            ("learned_source.weight", (self.rank, self.width), self.dtype),
            ("learned_source.bias", (self.rank,), self.dtype),
            (
                "rotate_layer.parametrizations.weight.original",
                (self.width, self.rank),
                DType.FLOAT32,
            ),
        )
        return tuple(
            Weight(name, shape, dtype, self.trainable, source=_INTERVENTION)
            for name, shape, dtype in shapes
        )

    def buffers(self) -> tuple[Buffer, ...]:
        """Return the square matrix that torch's parametrization multiplies R with.

        Source: torch-parametrizations, _Orthogonal.right_inverse (self.base = Q, n x n).
        """
        stem = f"{self.name}.rotate_layer.parametrizations.weight.0"
        return (Buffer(f"{stem}.base", (self.width, self.width), DType.FLOAT32),)

    def intervene(self, run: Any, hidden: Tensor) -> Tensor:
        """Edit the hidden states in place; a copy of all of them is made to read the positions.

        Source: pyvene, models/intervenable_base.py, _gather_intervention_output and
        _scatter_intervention_output.
        """
        with run.tape.module(self.name):
            edited = self._edit(run, self._gather(hidden))
            return self._scatter(hidden, edited)

    def _gather(self, hidden: Tensor) -> Tensor:
        """Return the positions; the gather keeps what it reads from, the whole copy."""
        whole = ops.copy(hidden, name="clone of the hidden states")
        tape = hidden.tape
        places = tape.new("positions", (BATCH, self.positions), DType.INT64, _GATHER)
        shape = (BATCH, self.positions, self.width)
        out = tape.new("gathered states", shape, hidden.dtype, _GATHER)

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor, ...]:
            return (node.new_grad(0, source=_GATHER),)

        tape.record("gather", (whole,), (whole, places), rule, out)
        return out

    def _edit(self, run: Any, base: Tensor) -> Tensor:
        """Return `base + (W base + b - base R) R^T`; R is computed anew each time it is used.

        Source: pyreft, interventions.py, LoreftIntervention.forward.
        """
        weight, bias, original = (run.param(self.name, each) for each in self.weights())
        autocasting = run.tape.autocast is not None and run.tape.autocast_enabled
        if base.dtype is not weight.dtype and not autocasting:
            raise InvalidRequestError(
                f"the interventions are {weight.dtype.label} and read {base.dtype.label} hidden "
                "states, which torch refuses; choose autocast"
            )
        rotation = self._rotation(run.tape, original)
        rotated = _product(ops.cast(base, rotation.dtype), rotation, self.rank)
        del rotation
        source = ops.linear(base, weight, bias, self.rank)
        difference = ops.add(source, rotated, "difference")
        del source
        rotation = self._rotation(run.tape, original)
        update = _product(difference, rotation, self.width)
        del difference, rotation
        output = ops.add(base, update, "edited states")
        del update
        return ops.dropout(ops.cast(output, base.dtype), self.dropout)

    def _rotation(self, tape: Tape, original: Param) -> Tensor:
        """Return R [h, r] from its Householder vectors; backward makes two square matrices.

        Shapes:
            vectors           [h, r]  4 bytes, saved
            product           [h, r]  4 bytes, saved
            scales and signs  [r]     4 bytes each, saved
            backward          [h, h]  4 bytes, twice

        Source: torch-parametrizations, _Orthogonal.forward; torch-autograd, FunctionsManual.cpp,
        householder_product_backward.
        """
        tall = (self.width, self.rank)
        square = (self.width, self.width)
        vectors = tape.new("Householder vectors", tall, ops.F32, _ORTHOGONAL)
        squares = tape.new("squares", tall, ops.F32, _ORTHOGONAL)
        tau = tape.new("scales", (self.rank,), ops.F32, _ORTHOGONAL)
        del squares
        product = tape.new("Householder product", tall, ops.F32, _ORTHOGONAL)
        signs = tape.new("signs", (self.rank,), ops.F32, _ORTHOGONAL)
        signed = tape.new("signed product", tall, ops.F32, _ORTHOGONAL)
        half = tape.autocast if tape.autocast_enabled else None
        base = None
        if half is not None:
            # autocast casts the constant matrix at every use and keeps the copy for backward.
            base = tape.new("square matrix in half precision", square, half, _ORTHOGONAL)
            signed = tape.new("signed product, cast", tall, half, _ORTHOGONAL)
        out = tape.new("rotation", tall, half or ops.F32, _ORTHOGONAL)
        del signed

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor, ...]:
            flowing = [node.scratch("gradient of the product", tall, ops.F32, _HOUSEHOLDER)]
            flowing.append(node.scratch("unit lower triangle", tall, ops.F32, _HOUSEHOLDER))
            flowing.append(node.scratch("K", square, ops.F32, _HOUSEHOLDER))
            flowing.append(node.scratch("update of K", square, ops.F32, _HOUSEHOLDER))
            flowing.clear()
            return (node.new_grad(0, source=_HOUSEHOLDER),)

        tape.record("orthogonal", (original,), (vectors, tau, product, signs, base), rule, out)
        return out

    def _scatter(self, hidden: Tensor, edited: Tensor) -> Tensor:
        """Write the edited states into the hidden states' own memory.

        Backward copies the whole gradient to put zeros there, and picks out what it replaces.

        Source: pyvene, models/modeling_utils.py, scatter_neurons; torch-derivatives, index_put.
        """
        tape, source = hidden.tape, Cite("torch-derivatives", "index_put")
        places = tape.new("positions", (BATCH, self.positions), DType.INT64, _SCATTER)
        rows = tape.new("rows", (BATCH, ONE), DType.INT64, _SCATTER)
        out = Tensor(tape, hidden.shape, hidden.dtype, hidden.storage, base=hidden.base)

        def rule(
            node: Node, grads: list[Tensor | None], saved: list[Any]
        ) -> tuple[Tensor | None, Tensor]:
            into_hidden = None
            if node.wants(0):
                zeros = [node.scratch("zeros", *node.meta_of(1), source)]
                into_hidden = node.new_grad(0, source=source)
                zeros.clear()
            return into_hidden, node.new_grad(1, source=source)

        tape.record("index_put", (hidden, edited), (places, rows), rule, out)
        return out


def _product(x: Tensor, matrix: Tensor, last: Dim) -> Tensor:
    """Multiply states with R or its transpose; each is saved if the other wants a gradient."""
    given = ops.autocast_to_half(x)
    source = Cite("torch-derivatives", "mm")
    out = x.tape.new("product", (*x.shape[:-1], last), given.dtype, source)

    def rule(
        node: Node, grads: list[Tensor | None], saved: list[Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        into_x = node.new_grad(0, source=source) if node.wants(0) else None
        return into_x, node.new_grad(1, source=source) if node.wants(1) else None

    saved = (given if matrix.requires_grad else None, matrix if given.requires_grad else None)
    x.tape.record("product", (given, matrix), saved, rule, out)
    return out


class LoReft(Method, frozen=True, tag="loreft"):
    """Train low-rank interventions on the hidden states behind layers (pyreft)."""

    source: ClassVar[Cite] = Cite("wu2024reft", "section 3.2, equation 2")

    r: Annotated[int, Meta(ge=1, le=65_536, description="Rank of the adapters.")] = 8
    layers: Annotated[
        tuple[int, ...], Meta(description="Numbers of the layers with interventions; none: all.")
    ] = ()
    positions: Annotated[
        str, Meta(max_length=20, description="First and last tokens that are edited: f7+l7.")
    ] = "f1+l1"
    share_weights: Annotated[
        bool, Meta(description="One intervention for first and last tokens, not two.")
    ] = False
    dropout: Annotated[float, Meta(ge=0, lt=1, description="Dropout on the edited states.")] = 0.0

    @property
    def singles_out_layers(self) -> bool:
        """Whether only some layers have interventions."""
        return bool(self.layers)

    @property
    def places(self) -> tuple[int, ...]:
        """The number of positions that each intervention of a layer edits.

        Source: pyreft, dataset.py, parse_positions and get_intervention_locations.

        Raises:
            InvalidRequestError: `positions` is none of f1, l1, f1+l1.
        """
        found = _POSITIONS.fullmatch(self.positions)
        first, last = (int(each or 0) for each in found.groups()) if found else (0, 0)
        if not first + last:
            raise InvalidRequestError(
                f"positions: write first and last tokens as in f7+l7 (given {self.positions!r})"
            )
        if self.share_weights or not first or not last:
            return (first + last,)
        return (max(first, last),) * 2

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and interventions behind the layers.

        Raises:
            InvalidRequestError: a layer that the model has not, or positions that say nothing.
        """
        spec = run.spec
        count = len(spec.pattern)
        beyond = [each for each in self.layers if not 0 <= each < count]
        if beyond:
            raise InvalidRequestError(
                f"layers: the model has layers 0 to {count - 1} (given {beyond[0]})"
            )
        added = tuple(
            Intervention(
                name=f"intervention.{number}",
                width=spec.hidden,
                rank=dim("r", self.r),
                positions=dim("p", positions),
                dropout=self.dropout,
            )
            for number, positions in enumerate(self.places)
        )

        def change(kind: LayerKind, chosen: bool) -> LayerKind:
            return replace(kind, modules=(*kind.modules, *added)) if chosen else kind

        chosen = set(self.layers or range(count))
        spec = by_layer(spec.map_modules(_frozen), chosen.__contains__, change)
        matrices = tuple(each for one in added for each in one.buffers()) * len(chosen)
        return replace(run, spec=replace(spec, buffers=(*spec.buffers, *matrices)))


def _frozen(module: Module) -> Module:
    return replace(module, trainable=False, trainable_bias=False)
