"""VB-LoRA: both low-rank matrices put together from the vectors of one bank for all layers."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import ONE, Dim, Shape, dim
from estimator.eager.tensor import Node, Param, Tape, Tensor, view
from estimator.errors import InvalidRequestError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Module, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, Targets, adapted, saved
from estimator.techniques.targets import ADALORA, targets

F32: Final = DType.FLOAT32
BANK: Final = "vblora_vector_bank"
_SCRATCH: Final = (
    "vblora: what the kernels of topk and of the bank's gradient take inside themselves, a few "
    "bytes for each logit, is not counted"
)
_LAYER: Final = Cite("peft", "tuners/vblora/layer.py, Linear._get_low_rank_matrix")
_MADE: Final = Cite("peft", "tuners/vblora/layer.py, VBLoRALayer.update_layer")
_BANK: Final = Cite("peft", "tuners/vblora/model.py, VBLoRAModel._init_vblora_vector_bank")


class VectorBank(Module, frozen=True, eq=False, kw_only=True):
    """The vectors that all layers share.

    Args:
        count: how many.
        length: of each.
    """

    count: Dim
    length: Dim

    def weights(self) -> tuple[Weight, ...]:
        """Return the bank [vectors, length], fp32 whatever the model is."""
        return (Weight("weight", (self.count, self.length), F32, True, source=_BANK),)


class VbLoraAdapter(Struct, frozen=True):
    """The logits of one linear layer, which choose and weigh vectors of the bank."""

    r: int
    topk: int
    vectors: int
    length: int
    dropout: float

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the logits, fp32; all of them are kept, whatever is saved in the end.

        Shapes:
            vblora_logits_A  [r, in/length, vectors]   4 bytes
            vblora_logits_B  [out/length, r, vectors]  4 bytes

        Source: peft, tuners/vblora/layer.py, VBLoRALayer.update_layer.
        """
        (first, second), vectors = self._tiles(linear), dim("vectors", self.vectors)
        return (
            Weight("vblora_logits_A", (*first, vectors), F32, True, source=_MADE),
            Weight("vblora_logits_B", (*second, vectors), F32, True, source=_MADE),
        )

    def _tiles(self, linear: Linear) -> tuple[Shape, Shape]:
        rank = dim("r", self.r)
        wide, tall = (
            dim(f"{each.letter}/length", each.value // self.length)
            for each in (linear.fan_in, linear.fan_out)
        )
        return (rank, wide), (tall, rank)

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return `base(x) + B(A(dropout(x)))` in the input's type.

        Source: peft, tuners/vblora/layer.py, Linear.forward.
        """
        previous, rank = x.dtype, dim("r", self.r)
        result = run.base_linear(x, linear)
        first, second = (run.param(linear.name, each) for each in self.weights(linear))
        down = view(self._matrix(run, first), (rank, linear.fan_in))
        up = ops.copy(self._matrix(run, second), (linear.fan_out, rank), "B by row")
        x = ops.cast(x, F32, "input cast for the adapter")
        result = ops.add(
            result,
            ops.linear(
                ops.linear(ops.dropout(x, self.dropout), down, None, rank),
                up, None, linear.fan_out,
            ),
            "sum with the update",
        )  # fmt: skip
        return ops.cast(result, previous, "sum in the input's type")

    def _matrix(self, run: Forward, logits: Param) -> Tensor:
        """Return one low-rank matrix, tile by tile.

        Shapes, for the tiles [n, m] of a matrix:
            values, weights      [n, m, k]          4 bytes, the weights saved
            numbers              [n, m, k]          8 bytes, saved
            vectors              [n, m, k, length]  4 bytes, saved
            weighted vectors     [n, m, k, length]  4 bytes
            matrix               [n, m, length]     4 bytes
            in backward: gradients of vectors and weights in full, [n, m, k, length] each

        Source: peft, tuners/vblora/layer.py, Linear._get_low_rank_matrix.
        """
        tape, tiles = run.tape, logits.shape[:2]
        chosen, length = dim("k", self.topk), dim("length", self.length)
        shape = (*tiles, chosen)
        values, numbers = _topk(tape, logits, shape)
        weights = ops.softmax(values)
        bank = Weight("weight", (dim("vectors", self.vectors), length), F32, True, source=_BANK)
        vectors = _looked_up(tape, run.param(BANK, bank, 0), numbers, (*shape, length))
        weighed = [ops.mul(view(weights, (*shape, ONE)), vectors, "weighted vectors")]
        del vectors
        return _summed(tape, weighed, (*tiles, length))


def _topk(tape: Tape, logits: Param, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the largest logits and their numbers; backward fills zeros around the gradient."""
    values = tape.new("largest logits", shape, F32, _LAYER)
    numbers = tape.new("numbers of the vectors", shape, DType.INT64, _LAYER)

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        return (node.new_grad(0),)

    tape.record("topk", (logits,), (numbers,), rule, values)
    return values, numbers


def _looked_up(tape: Tape, bank: Param, numbers: Tensor, shape: Shape) -> Tensor:
    """Return vectors of the bank; backward adds their gradients up in one of the bank's size."""
    out = tape.new("vectors", shape, F32, _LAYER)

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        return (node.new_grad(0),)

    tape.record("index", (bank,), (numbers,), rule, out)
    return out


def _summed(tape: Tape, weighed: list[Tensor], shape: Shape) -> Tensor:
    """Return the sum over the chosen vectors; its backward is a broadcast view."""
    out, whole = tape.new("matrix", shape, F32, _LAYER), weighed[0].shape

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        (grad,) = grads
        return (Tensor(grad.tape, whole, grad.dtype, grad.storage, base=grad.base or grad),)

    tape.record("sum", (weighed.pop(),), (), rule, out)
    return out


class VbLora(Method, frozen=True, tag="vblora"):
    """Train a bank of vectors, and logits that mix them, per layer (PEFT's VBLoRAConfig)."""

    peft: ClassVar[str | None] = "VBLoRAConfig"
    source: ClassVar[Cite] = _LAYER

    r: Annotated[int, Meta(ge=1, le=65_536)] = 4
    num_vectors: Annotated[int, Meta(ge=1, le=1_000_000, description="Vectors of the bank.")] = 256
    vector_length: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Length of each vector.")
    ] = 256
    topk: Annotated[int, Meta(ge=1, le=1024, description="Vectors mixed for each tile.")] = 2
    vblora_dropout: Annotated[
        Annotated[float, Meta(ge=0, lt=1)], Meta(description="Dropout before the adapters.")
    ] = 0.0
    save_only_topk_weights: Annotated[
        bool, Meta(description="Save less with the adapter; training keeps all logits.")
    ] = False
    target_modules: Literal["all-linear"] | Names = ()
    modules_to_save: Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen, logits on each target, and the bank.

        Raises:
            InvalidRequestError: more vectors to mix than there are, or a layer whose widths are no
                multiple of a vector, as PEFT refuses it.

        Source: peft, tuners/vblora/layer.py, VBLoRALayer.update_layer.
        """
        if self.topk > self.num_vectors:
            raise InvalidRequestError(
                f"topk {self.topk} is more than the {self.num_vectors} vectors of the bank"
            )
        named = targets(self.target_modules, ADALORA, run.spec.model_type)
        chosen = Targets(
            "all-linear" if isinstance(named, str) else named, modules_to_save=self.modules_to_save
        )
        adapter = VbLoraAdapter(
            self.r, self.topk, self.num_vectors, self.vector_length, self.vblora_dropout
        )

        def tiled(linear: Linear) -> VbLoraAdapter:
            for each in (linear.fan_in, linear.fan_out):
                if each.value % self.vector_length:
                    raise InvalidRequestError(
                        f"vector_length {self.vector_length} does not divide the {each.value} "
                        f"of {linear.name}; choose another"
                    )
            return adapter

        spec = saved(adapted(run.spec, chosen, tiled), self.modules_to_save)
        bank = VectorBank(
            name=BANK,
            count=dim("vectors", self.num_vectors),
            length=dim("length", self.vector_length),
        )
        spec = replace(spec, embeddings=(*spec.embeddings, bank), notes=(*spec.notes, _SCRATCH))
        return replace(run, spec=spec)
