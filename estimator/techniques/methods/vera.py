"""VeRA: two trained vectors beside each layer, around one frozen pair of matrices for all."""

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Linear, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, Targets, adapted_by_path, saved

_LAYER: Final = Cite("peft", "tuners/vera/layer.py, Linear.forward")
_PAPER: Final = Cite("kopiczko2023", "equation 2")


class VeraAdapter(Struct, frozen=True):
    """The two vectors of one linear layer; A and B are slices of buffers that all layers share."""

    r: int
    dropout: float

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the vectors, which PEFT keeps in fp32.

        Shapes:
            lambda_b  [out]  4 bytes
            lambda_d  [r]    4 bytes

        Source: kopiczko2023, equation 2.
        """
        rank = dim("r", self.r)
        return (
            Weight("vera_lambda_b", (linear.fan_out,), DType.FLOAT32, True, source=_PAPER),
            Weight("vera_lambda_d", (rank,), DType.FLOAT32, True, source=_PAPER),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return `base(x) + lambda_b * B(lambda_d * A(dropout(x)))` in the input's type.

        Source: peft, tuners/vera/layer.py, Linear.forward.
        """
        previous, rank = x.dtype, dim("r", self.r)
        result = run.base_linear(x, linear)
        orig_dtype = result.dtype
        if linear.format is not None and linear.format.wrapper.clones:
            result = ops.copy(result, name="clone of the base output")
        lambda_b, lambda_d = (run.param(linear.name, each) for each in self.weights(linear))
        down = run.param(linear.name, _shared("vera_A", (rank, linear.fan_in)))
        up = run.param(linear.name, _shared("vera_B", (linear.fan_out, rank)))
        x = ops.cast(x, DType.FLOAT32, "input cast for the adapter")
        result = ops.add(
            result,
            ops.mul(
                lambda_b,
                ops.linear(
                    ops.mul(
                        lambda_d,
                        ops.linear(ops.dropout(x, self.dropout), down, None, rank),
                        "A(x) times lambda_d",
                    ),
                    up,
                    None,
                    linear.fan_out,
                ),
                "update times lambda_b",
            ),
        )
        result = ops.cast(result, orig_dtype, "sum cast back")
        return ops.cast(result, previous, "output in the input's type")


def _shared(name: str, shape: tuple[Dim, Dim]) -> Weight:
    """Return a slice of a shared buffer: a view, which costs nothing."""
    return Weight(name, shape, DType.FLOAT32, False, source=_LAYER)


class Vera(Method, frozen=True, tag="vera"):
    """Train two vectors beside each layer, around frozen random matrices (PEFT's VeraConfig)."""

    peft: ClassVar[str | None] = "VeraConfig"
    source: ClassVar[Cite] = _PAPER

    r: Annotated[int, Meta(ge=1, le=65_536)] = 256
    target_modules: Literal["all-linear"] | Names = "all-linear"
    vera_dropout: Annotated[
        Annotated[float, Meta(ge=0, lt=1)], Meta(description="Dropout before the adapters.")
    ] = 0.0
    save_projection: Annotated[
        bool, Meta(description="Save A and B with the adapter; costs no memory in training.")
    ] = True
    modules_to_save: Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen, the vectors, and the two shared buffers.

        Shapes:
            A  [r, the widest input of a target]   4 bytes
            B  [the widest output of a target, r]  4 bytes

        Source: peft, tuners/vera/model.py, VeraModel._init_vera_A_vera_B and _find_dim.
        """
        targets = Targets(self.target_modules, modules_to_save=self.modules_to_save)
        adapter = VeraAdapter(self.r, self.vera_dropout)
        spec = adapted_by_path(run.spec, targets, lambda *_: adapter)
        linears = [each for each, _ in spec.module_counts() if isinstance(each, Linear)]
        adapted = [each for each in (*linears, spec.head) if each.adapter is not None]
        rank = dim("r", self.r)
        widest = max((each.fan_in for each in adapted), key=lambda each: each.value)
        highest = max((each.fan_out for each in adapted), key=lambda each: each.value)
        shared = (
            Buffer("vera_A", (rank, widest), DType.FLOAT32),
            Buffer("vera_B", (highest, rank), DType.FLOAT32),
        )
        spec = saved(replace(spec, buffers=(*spec.buffers, *shared)), self.modules_to_save)
        return replace(run, spec=spec)
