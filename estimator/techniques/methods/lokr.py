"""LoKr: the update of a weight as the Kronecker product of two smaller matrices."""

from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType, promote
from estimator.eager import ops
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Param, Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted
from estimator.techniques.methods.loha import FullUpdate, plain
from estimator.techniques.targets import ATTENTION, targets

_LAYER: Final = Cite("peft", "tuners/lokr/layer.py, LoKrLayer")
_KRON: Final = Cite("torch-derivatives", "mul.Tensor")


class _Factor(NamedTuple):
    """One side of the Kronecker product: a matrix, or two of rank r in place of it."""

    name: str
    rows: Dim
    columns: Dim
    rank: Dim | None

    def weights(self) -> tuple[Weight, ...]:
        shapes = {self.name: (self.rows, self.columns)}
        if self.rank is not None:
            shapes = {
                f"{self.name}_a": (self.rows, self.rank),
                f"{self.name}_b": (self.rank, self.columns),
            }
        return tuple(
            Weight(name, shape, DType.FLOAT32, True, source=_LAYER)
            for name, shape in shapes.items()
        )

    def made(self, run: Forward, linear: Linear) -> Param | Tensor:
        """Return the matrix: the parameter itself, or the product of two."""
        params = [run.param(linear.name, each) for each in self.weights()]
        if len(params) == 1:
            return params[0]
        left, right = (ops.autocast_weight(run.tape, each) for each in params)
        source = Cite("torch-derivatives", "mm")
        shape = (self.rows, self.columns)
        out = run.tape.new(self.name, shape, left.dtype, source)

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor, ...]:
            return node.new_grad(0), node.new_grad(1)

        run.tape.record(self.name, (left, right), (left, right), rule, out)
        return out


class LokrAdapter(FullUpdate, frozen=True):
    """Two factors whose Kronecker product has the shape of the weight."""

    r: int
    decompose_both: bool
    decompose_factor: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the factors, fp32; out = l·k and in = m·n.

        Shapes:
            lokr_w1                 [l, m]          4 bytes
            lokr_w2                 [k, n]          4 bytes, or where r is below half of either
            lokr_w2_a, lokr_w2_b    [k, r], [r, n]  4 bytes

        Source: yeh2023, section 3; peft, tuners/lokr/layer.py, LoKrLayer.update_layer.
        """
        return tuple(weight for each in self._factors(linear) for weight in each.weights())

    def _factors(self, linear: Linear) -> tuple[_Factor, _Factor]:
        m, n = factorization(linear.fan_in.value, self.decompose_factor)
        left, k = factorization(linear.fan_out.value, self.decompose_factor)
        rank = dim("r", self.r)
        small = self.decompose_both and self.r < max(left, m) / 2
        return (
            _Factor("lokr_w1", dim("l", left), dim("m", m), rank if small else None),
            _Factor("lokr_w2", dim("k", k), dim("n", n), rank if self.r < max(k, n) / 2 else None),
        )

    def delta(self, run: Forward, linear: Linear) -> Tensor:
        """Return `kron(w1, w2) * scale`; backward makes two products of the weight's size.

        Shapes:
            kron, the update  [out, in]  4 bytes

        Source: peft, tuners/lokr/layer.py, LoKrLayer.get_delta_weight and make_kron;
        torch-derivatives, mul.Tensor.
        """
        first, second = (each.made(run, linear) for each in self._factors(linear))
        shape, dtype = (linear.fan_out, linear.fan_in), promote(first.dtype, second.dtype)
        out = run.tape.new("kron", shape, dtype, _KRON)

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor, ...]:
            return node.new_grad(0, shape, dtype), node.new_grad(1, shape, dtype)

        run.tape.record("kron", (first, second), (first, second), rule, out)
        return ops.scale(out, "update")


class Lokr(Method, frozen=True, tag="lokr"):
    """Train the factors of a Kronecker product (PEFT's LoKrConfig)."""

    peft: ClassVar[str | None] = "LoKrConfig"
    source: ClassVar[Cite] = Cite("yeh2023", "section 3, LoKr")
    quantizations: ClassVar[frozenset[str] | None] = frozenset()

    r: Annotated[int, Meta(ge=1, le=65_536)] = 8
    alpha: Annotated[float, Meta(gt=0, le=1e9, description="scale; costs no memory")] = 8.0
    decompose_both: bool = False
    decompose_factor: Annotated[
        int, Meta(ge=-1, le=65_536, description="largest first factor; -1 for the squarest")
    ] = -1
    target_modules: Literal["all-linear"] | Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and an update on each target."""
        named = targets(self.target_modules, ATTENTION, run.spec.model_type)
        adapter = LokrAdapter(
            r=self.r, decompose_both=self.decompose_both, decompose_factor=self.decompose_factor
        )
        spec = adapted(run.spec, named, lambda linear: plain(linear, adapter, self.name))
        return replace(run, spec=spec)


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is the dimension, the smaller one first.

    Source: peft, tuners/lokr/layer.py, factorization.

    Example:
        >>> factorization(256, -1), factorization(127, -1), factorization(128, 4)
        ((16, 16), (1, 127), (4, 32))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m, n = 1, dimension
    length = m + n
    while m < n:
        new_m = m + 1
        while dimension % new_m != 0:
            new_m += 1
        new_n = dimension // new_m
        if new_m + new_n > length or new_m > limit:
            break
        m, n = new_m, new_n
    return (m, n) if m <= n else (n, m)
