"""OFT: the input of a layer is rotated, block by block, by trained orthogonal matrices."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import BATCH, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor, view
from estimator.errors import InvalidRequestError
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Linear, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted
from estimator.techniques.targets import ATTENTION, targets

_LAYER: Final = Cite("peft", "tuners/oft/layer.py, OFTRotationModule")
F32: Final = DType.FLOAT32


class OftAdapter(Struct, frozen=True):
    """The rotation of one layer's input.

    Args:
        block: width of a block, as asked.
        terms: of the Neumann series.
    """

    block: int
    terms: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the upper triangles of the blocks' skew-symmetric matrices.

        Shapes:
            weight  [in / k, k (k - 1) / 2]  4 bytes

        Source: qiu2023, section 4; peft, tuners/oft/layer.py, OFTLayer.update_layer.
        """
        blocks, width = self._blocks(linear)
        triangle = dim("k(k-1)/2", width.value * (width.value - 1) // 2)
        return (Weight("oft_R.weight", (blocks, triangle), F32, True, source=_LAYER),)

    def buffers(self, linear: Linear) -> tuple[Buffer, ...]:
        """Return the indices of the upper triangle.

        Shapes:
            rows, cols  [k (k - 1) / 2]  8 bytes

        Source: peft, tuners/oft/layer.py, OFTRotationModule.__init__.
        """
        shape = self.weights(linear)[0].shape[1:]
        return tuple(
            Buffer(f"{linear.name}.oft_R.{name}", shape, DType.INT64) for name in ("rows", "cols")
        )

    def _blocks(self, linear: Linear) -> tuple[Dim, Dim]:
        width = nearest_divisor(linear.fan_in.value, self.block)
        return dim("in/k", linear.fan_in.value // width), dim("k", width)

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Rotate the input in fp32, then run the layer.

        Shapes:
            input                   [b, s, in]   4 bytes, saved
            rotation, by blocks     [in/k, k, k] 4 bytes, saved with its powers
            rotated input           [b, s, in]   4 bytes, twice

        Source: peft, tuners/oft/layer.py, Linear.forward and OFTRotationModule.forward.
        """
        previous = x.dtype
        rotated = self._rotated(run, linear, ops.cast(x, F32, "input in fp32"))
        result = run.base_linear(ops.cast(rotated, previous, "rotated input"), linear)
        return ops.cast(result, previous)

    def _rotated(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        blocks, width = self._blocks(linear)
        rotation = self._rotation(run, linear, (blocks, width, width))
        # Blocks first, as the batched product has them; writing them by token copies.
        by_block = (BATCH, SEQ, blocks, width)
        product = ops.matmul(
            view(x, (blocks, BATCH, SEQ, width)), rotation, (blocks, BATCH, SEQ, width), "product"
        )
        del rotation
        by_token = _by_token(product, by_block)
        return ops.cast(view(by_token, x.shape), x.dtype)

    def _rotation(self, run: Forward, linear: Linear, shape: Shape) -> Tensor:
        """Return `(1 + Q)(1 - Q)^-1` as a Neumann series in the skew-symmetric Q.

        Source: peft, tuners/oft/layer.py, OFTRotationModule._cayley_batch.
        """
        tape, weight = run.tape, run.param(linear.name, self.weights(linear)[0])
        triangle = tape.new("upper triangles", shape, F32, _LAYER)

        def filled(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
            return (node.new_grad(0),)

        tape.record("index_put", (weight,), (), filled, triangle)
        skew = _skew(triangle)
        del triangle
        total = tape.new("rotation", shape, F32, _LAYER)
        if self.terms > 1:
            total = _add_twice(total, skew)
        if self.terms > 2:
            power = ops.matmul(skew, skew, shape, "power")
            total = _add_twice(total, power)
            for _ in range(3, self.terms - 1):
                power = ops.matmul(power, skew, shape, "power")
                total = _add_twice(total, power)
            power = ops.matmul(power, skew, shape, "power")
            total = ops.add_in_place(total, power)
        return total


def _by_token(x: Tensor, shape: Shape) -> Tensor:
    """Write a tensor that lies block by block out token by token; backward does the reverse."""
    out = x.tape.new("product by token", shape, x.dtype, Cite("torch-derivatives", "clone"))
    x.tape.record("by token", (x,), (), lambda node, grads, saved: (grads[0],), out)
    return out


def _skew(x: Tensor) -> Tensor:
    """Return `x - x^T`; backward negates for the transposed one."""
    out = x.tape.new("skew-symmetric", x.shape, x.dtype, _LAYER)

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Any, ...]:
        return grads[0], node.scratch("negated", *node.meta_of(0))

    x.tape.record("skew", (x, x), (), rule, out)
    return out


def _add_twice(total: Tensor, x: Tensor) -> Tensor:
    """`total += 2 x`: backward doubles the gradient for x."""
    out = Tensor(total.tape, total.shape, total.dtype, total.storage, base=total.base or total)

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Any, ...]:
        return grads[0] if node.wants(0) else None, node.new_grad(1)

    total.tape.record("add in place", (total, x), (), rule, out)
    return out


class Oft(Method, frozen=True, tag="oft"):
    """Train orthogonal rotations of the inputs of layers (PEFT's OFTConfig)."""

    peft: ClassVar[str | None] = "OFTConfig"
    source: ClassVar[Cite] = Cite("qiu2023", "section 4, orthogonal finetuning")

    oft_block_size: Annotated[int, Meta(ge=1, le=65_536, description="width of a block")] = 32
    num_cayley_neumann_terms: Annotated[
        int, Meta(ge=1, le=64, description="terms of the Neumann series")
    ] = 5
    target_modules: Literal["all-linear"] | Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and a rotation before each target.

        Raises:
            InvalidRequestError: GPT-2's Conv1D, as PEFT refuses it.
        """
        adapter = OftAdapter(self.oft_block_size, self.num_cayley_neumann_terms)

        def rotated(linear: Linear) -> OftAdapter:
            if linear.transposed:
                raise InvalidRequestError(
                    f"PEFT has no oft for {linear.name}, which is a Conv1D; use lora or ia3"
                )
            return adapter

        named = targets(self.target_modules, ATTENTION, run.spec.model_type)
        spec = adapted(run.spec, named, rotated)
        buffers = tuple(
            each
            for module, count in spec.module_counts()
            if isinstance(module, Linear) and module.adapter is adapter
            for _ in range(count)
            for each in adapter.buffers(module)
        )
        return replace(run, spec=replace(spec, buffers=(*spec.buffers, *buffers)))


def nearest_divisor(width: int, asked: int) -> int:
    """Return the divisor of a layer's width that PEFT takes in place of a block size.

    Source: peft, tuners/oft/layer.py, OFTLayer.adjust_oft_parameters.

    Example:
        >>> nearest_divisor(960, 32), nearest_divisor(1136, 32), nearest_divisor(16, 32)
        (32, 16, 16)
    """
    if width % asked == 0:
        return asked
    if asked >= width:
        return width
    higher = next(each for each in range(asked, width + 1) if width % each == 0)
    lower = next(each for each in range(asked, 0, -1) if width % each == 0)
    return lower if asked - lower <= higher - asked else higher
