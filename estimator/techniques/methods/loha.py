"""LoHa: the update of a weight as the elementwise product of two low-rank matrices."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType, promote
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Node, Tensor
from estimator.errors import InvalidRequestError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted
from estimator.techniques.targets import ATTENTION, targets

_LAYER: Final = Cite("peft", "tuners/loha/layer.py, HadaWeight")


class FullUpdate(Struct, frozen=True):
    """An adapter that writes the whole update of a weight out before it multiplies with it."""

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return what the update is made of."""
        raise NotImplementedError

    def delta(self, run: Forward, linear: Linear) -> Tensor:
        """Return the update, [out, in]."""
        raise NotImplementedError

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return `base(x) + x delta^T`; the product saves the update and x in its type.

        Source: peft, tuners/loha/layer.py, LoHaLayer.forward and Linear._get_delta_activations;
        tuners/lokr/layer.py alike.
        """
        result = run.base_linear(x, linear)
        result = ops.add(result, self._activations(run, linear, x), "sum with the update")
        return ops.cast(result, x.dtype, "sum in the input's type")

    def _activations(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        delta = self.delta(run, linear)
        given = ops.cast(x, delta.dtype, "input in the update's type")
        with run.tape.module("update"):
            return ops.linear(given, delta, None, linear.fan_out)


class LohaAdapter(FullUpdate, frozen=True):
    """Four matrices whose products are multiplied elementwise."""

    r: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return both pairs of matrices, fp32.

        Shapes:
            hada_w1_a, hada_w2_a  [out, r]  4 bytes
            hada_w1_b, hada_w2_b  [r, in]   4 bytes

        Source: nam2021, section 2.1; peft, tuners/loha/layer.py, create_adapter_parameters.
        """
        rank = dim("r", self.r)
        tall, wide = (linear.fan_out, rank), (rank, linear.fan_in)
        named = (("w1_a", tall), ("w1_b", wide), ("w2_a", tall), ("w2_b", wide))
        return tuple(
            Weight(f"hada_{name}", shape, DType.FLOAT32, True, source=_LAYER)
            for name, shape in named
        )

    def delta(self, run: Forward, linear: Linear) -> Tensor:
        """Return `(w1_a w1_b) * (w2_a w2_b) * scale`; backward makes both products again.

        Shapes:
            products, their product, the update  [out, in]  4 bytes; 2 under autocast

        Source: peft, tuners/loha/layer.py, HadaWeight.forward and backward.
        """
        tape, params = run.tape, [run.param(linear.name, each) for each in self.weights(linear)]
        factors = [ops.autocast_weight(tape, each) for each in params]
        shape, dtype = (linear.fan_out, linear.fan_in), factors[0].dtype
        factors.clear()
        pair = [tape.new(name, shape, dtype, _LAYER) for name in ("w1_a w1_b", "w2_a w2_b")]
        product = [tape.new("product of the products", shape, dtype, _LAYER)]
        pair.clear()
        out = tape.new("update", shape, dtype, _LAYER)
        product.clear()

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor, ...]:
            wide = promote(dtype, DType.FLOAT32)
            held = [node.scratch("scaled gradient", shape, dtype, _LAYER)]
            again = [node.scratch("w2_a w2_b", shape, DType.FLOAT32, _LAYER)]
            held.append(node.scratch("product", shape, wide, _LAYER))
            again.clear()
            first = (node.new_grad(0), node.new_grad(1))
            again.append(node.scratch("w1_a w1_b", shape, DType.FLOAT32, _LAYER))
            held.append(node.scratch("product", shape, wide, _LAYER))
            again.clear()
            del held[1]
            second = (node.new_grad(2), node.new_grad(3))
            held.clear()
            return (*first, *second)

        tape.record("HadaWeight", tuple(params), (), rule, out)
        return out


class Loha(Method, frozen=True, tag="loha"):
    """Train two low-rank products and multiply them elementwise (PEFT's LoHaConfig)."""

    peft: ClassVar[str | None] = "LoHaConfig"
    source: ClassVar[Cite] = Cite("nam2021", "section 2.1, FedPara")
    quantizations: ClassVar[frozenset[str] | None] = frozenset()

    r: Annotated[int, Meta(ge=1, le=65_536)] = 8
    alpha: Annotated[float, Meta(gt=0, le=1e9, description="scale; costs no memory")] = 8.0
    target_modules: Literal["all-linear"] | Names = ()

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and an update on each target."""
        named = targets(self.target_modules, ATTENTION, run.spec.model_type)
        adapter = LohaAdapter(r=self.r)
        spec = adapted(run.spec, named, lambda linear: plain(linear, adapter, self.name))
        return replace(run, spec=spec)


def plain(linear: Linear, adapter: FullUpdate, method: str) -> FullUpdate:
    """Return the adapter, unless the layer is no `nn.Linear`.

    Raises:
        InvalidRequestError: as PEFT refuses GPT-2's Conv1D.

    Source: peft, tuners/lycoris_utils.py, LycorisTuner._create_new_module.
    """
    if linear.transposed:
        raise InvalidRequestError(
            f"PEFT has no {method} for {linear.name}, which is a Conv1D; use lora or ia3"
        )
    return adapter
