"""BOFT: the input of a layer is rotated by a full matrix, made of small orthogonal blocks."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import ONE, Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor
from estimator.errors import InvalidRequestError
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Linear, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted
from estimator.techniques.targets import ATTENTION, targets

_LAYER: Final = Cite("peft", "tuners/boft/layer.py, Linear.forward")
_CAYLEY: Final = Cite("peft", "tuners/boft/layer.py, BOFTLayer.cayley_batch")
F32: Final = DType.FLOAT32


class BoftAdapter(Struct, frozen=True):
    """The rotation and the scale of one layer.

    Args:
        block: width of a block.
    """

    block: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the blocks and the scale of each output.

        Shapes:
            boft_R  [1, in / k, k, k]  4 bytes
            boft_s  [out, 1]           4 bytes

        Source: liu2023boft, section 4; peft, tuners/boft/layer.py, Linear.forward.
        """
        blocks = (ONE, *self._blocks(linear))
        return (
            Weight("boft_R", blocks, F32, True, source=_LAYER),
            Weight("boft_s", (linear.fan_out, ONE), F32, True, source=_LAYER),
        )

    def buffers(self, linear: Linear) -> tuple[Buffer, ...]:
        """Return the permutation, a full matrix even where it is the identity.

        Shapes:
            boft_P  [1, in, in]  4 bytes

        Source: peft, tuners/boft/layer.py, BOFTLayer.update_layer.
        """
        shape = (ONE, linear.fan_in, linear.fan_in)
        return (Buffer(f"{linear.name}.boft_P", shape, F32),)

    def _blocks(self, linear: Linear) -> tuple[Dim, Dim, Dim]:
        if linear.fan_in.value % self.block:
            raise InvalidRequestError(
                f"in_features {linear.fan_in.value} of {linear.name} must be divisible by "
                f"boft_block_size {self.block}"
            )
        width = dim("k", self.block)
        return dim("in/k", linear.fan_in.value // self.block), width, width

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Rotate the input, run the layer, scale its output; the names live until it returns.

        Shapes:
            identity, permutation, rotation   [in, in]     width of x each, saved
            input                             [b, s, in]   width of x, saved
            output                            [b, s, out]  width of x, saved; scaled in fp32

        Source: peft, tuners/boft/layer.py, Linear.forward and BOFTLayer.cayley_batch.
        """
        tape, previous, square = run.tape, x.dtype, (linear.fan_in, linear.fan_in)
        whole: Shape = (ONE, *square)
        identity = tape.new("identity", square, previous, _LAYER)
        ones = tape.new("ones", (linear.fan_out, ONE), previous, _LAYER)
        params = [run.param(linear.name, each) for each in self.weights(linear)]
        orthogonal = _cayley(run, linear, self._blocks(linear))
        diagonal = _block_diagonal(orthogonal, whole)
        permutation = Tensor(tape, whole, previous, None)
        if previous is not F32:
            tape.allocate(permutation, "permutation", _LAYER)
        diagonal = ops.cast(diagonal, previous)
        mixed = _product(diagonal, permutation, whole, "diagonal by permutation")
        mixed = _product(permutation, mixed, whole, "butterfly")
        rotation = _product(_first(mixed, square), identity, square, "rotation")
        scale = ops.mul(params[1], ones, "scale")
        rotation = ops.cast(rotation, previous)
        with tape.module("rotate"):
            rotated = ops.linear(x, rotation, None, linear.fan_in)
        result = run.base_linear(rotated, linear)
        bias = linear.bias_weight()
        vector = run.param(linear.name, bias) if bias is not None else None
        if vector is not None:
            result = ops.add(result, vector, "without the bias")
        result = ops.mul(result, _flat(scale, (linear.fan_out,)), "scaled output")
        if vector is not None:
            result = ops.add(result, vector, "with the bias")
        return ops.cast(result, previous)


def _cayley(run: Forward, linear: Linear, shape: Shape) -> Tensor:
    """Return `(1 + Q)^-1 (1 - Q)` of the skew-symmetric part Q of the blocks, in fp32."""
    tape = run.tape
    adapter = linear.adapter
    assert adapter is not None
    blocks = run.param(linear.name, adapter.weights(linear)[0])
    difference = tape.new("difference", shape, F32, _CAYLEY)

    def skewed(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Any, ...]:
        return (node.new_grad(0),)

    tape.record("skew", (blocks,), (), skewed, difference)
    skew = ops.scale(difference, "skew-symmetric")
    del difference
    plus, minus = ops.shift(skew, "1 + Q"), ops.shift(skew, "1 - Q")
    out = tape.new("solution", shape, F32, _CAYLEY)
    factors = tape.new("LU factors", shape, F32, _CAYLEY)
    pivots = tape.new("pivots", shape[:2], DType.INT32, _CAYLEY)

    def solved(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Any, ...]:
        return node.new_grad(0), node.new_grad(1)

    tape.record("linalg_solve", (plus, minus), (plus, factors, pivots, out), solved, out)
    return out


def _block_diagonal(x: Tensor, shape: Shape) -> Tensor:
    out = x.tape.new("block diagonal", shape, x.dtype, _LAYER)

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
        return (node.new_grad(0),)

    x.tape.record("block_diag", (x,), (), rule, out)
    return out


def _product(x: Tensor, y: Tensor, shape: Shape, name: str) -> Tensor:
    return ops.matmul(x, y, shape, name)


def _first(x: Tensor, shape: Shape) -> Tensor:
    """Return the only matrix of a batch: a view, whose backward fills a tensor of zeros."""
    return ops.part(x, shape)


def _flat(x: Tensor, shape: Shape) -> Tensor:
    out = Tensor(x.tape, shape, x.dtype, x.storage, base=x.base or x)
    x.tape.record("squeeze", (x,), (), lambda node, grads, saved: (grads[0],), out)
    return out


class Boft(Method, frozen=True, tag="boft"):
    """Train orthogonal blocks of a full rotation of inputs (PEFT's BOFTConfig).

    As without the CUDA extension that PEFT would compile, which takes one butterfly factor.
    """

    peft: ClassVar[str | None] = "BOFTConfig"
    source: ClassVar[Cite] = Cite("liu2023boft", "section 4, butterfly factorization")

    boft_block_size: Annotated[int, Meta(ge=1, le=65_536, description="width of a block")] = 4
    target_modules: Literal["all-linear"] | Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and a rotation before each target."""
        adapter = BoftAdapter(self.boft_block_size)
        named = targets(self.target_modules, ATTENTION, run.spec.model_type)
        spec = adapted(run.spec, named, lambda _: adapter)
        buffers = tuple(
            each
            for module, count in spec.module_counts()
            if isinstance(module, Linear) and module.adapter is adapter
            for _ in range(count)
            for each in adapter.buffers(module)
        )
        return replace(run, spec=replace(spec, buffers=(*spec.buffers, *buffers)))
