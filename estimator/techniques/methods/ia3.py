"""IA3: one trained vector for each targeted layer, multiplied into its output or its input."""

from typing import Any, ClassVar, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.tensor import Node, Param, Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted
from estimator.techniques.targets import IA3, IA3_FEEDFORWARD, targets

_LAYER: Final = Cite("peft", "tuners/ia3/layer.py, Linear")


class Ia3Adapter(Struct, frozen=True):
    """The vector of one linear layer.

    Args:
        feedforward: it scales the input of the layer; otherwise the output.
    """

    feedforward: bool

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the vector, which PEFT keeps in fp32.

        Shapes:
            ia3_l  [out], or [in] of a feed-forward layer  4 bytes

        Source: liu2022, section 3.3; peft, tuners/ia3/layer.py, Linear.
        """
        width = linear.fan_in if self.feedforward else linear.fan_out
        return (Weight("ia3_l", (width,), DType.FLOAT32, True, source=_LAYER),)

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Run the layer with its input or its output scaled in fp32.

        Source: peft, tuners/ia3/layer.py, Linear.forward; tuners/ia3/bnb.py, Linear4bit.forward
        and Linear8bitLt.forward.
        """
        scaling = _times_one(run, run.param(linear.name, self.weights(linear)[0]))
        if linear.format is not None:
            return self._over_packed(run, linear, x, scaling)
        if self.feedforward:
            previous = x.dtype
            x = ops.cast(x, DType.FLOAT32, "input in fp32")
            scaled = ops.cast(ops.mul(x, scaling, "scaled input"), previous)
            return run.base_linear(scaled, linear)
        result = run.base_linear(x, linear)
        return ops.cast(ops.mul(result, scaling, "scaled output"), result.dtype)

    def _over_packed(self, run: Forward, linear: Linear, x: Tensor, scaling: Tensor) -> Tensor:
        """Do the same around packed weights: input in fp32 without autocast, then a clone."""
        autocasting = run.tape.autocast is not None and run.tape.autocast_enabled
        converts = not autocasting and x.dtype is not DType.FLOAT32
        if converts:
            x = ops.cast(x, DType.FLOAT32, "input in fp32")
        if self.feedforward:
            result = run.base_linear(ops.mul(x, scaling, "scaled input"), linear)
            expected = result.dtype
        else:
            result = run.base_linear(x, linear)
            expected = result.dtype
            result = ops.mul(result, scaling, "scaled output")
        if linear.format is not None and linear.format.wrapper.clones:
            result = ops.copy(result, name="clone of the output")
        return ops.cast(result, expected) if converts else result


def _times_one(run: Forward, vector: Param) -> Tensor:
    """Return `1 * ia3_l`, a copy in which several adapters would be multiplied."""
    out = run.tape.new("scaling", vector.shape, vector.dtype, _LAYER)

    def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
        return (node.new_grad(0),)

    run.tape.record("scaling", (vector,), (), rule, out)
    return out


class Ia3(Method, frozen=True, tag="ia3"):
    """Train one vector for each targeted linear layer (PEFT's IA3Config)."""

    peft: ClassVar[str | None] = "IA3Config"
    source: ClassVar[Cite] = Cite("liu2022", "section 3.3, (IA)3")
    quantizations: ClassVar[frozenset[str] | None] = frozenset({"nf4", "fp4", "int8"})

    target_modules: Literal["all-linear"] | Names = ()
    feedforward_modules: Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and a vector on each target."""
        spec = run.spec
        named = targets(self.target_modules, IA3, spec.model_type)
        inputs = targets(
            self.feedforward_modules, IA3_FEEDFORWARD, spec.model_type, "feedforward_modules"
        )

        def adapter(linear: Linear) -> Ia3Adapter:
            return Ia3Adapter(any(linear.name.endswith(each) for each in inputs))

        return replace(run, spec=adapted(spec, named, adapter))
