"""Bottleneck adapters: a small trained MLP behind a sublayer, inside its residual."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Tensor
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import activate
from estimator.model.spec import LayerKind, Module, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method

# Where the library's own layers call the adapters, by the model class (adapters, models/*).
FAMILIES: Final = ("gpt2", "llama", "mistral")


class Bottleneck(Module, frozen=True, eq=False, kw_only=True):
    """One adapter: down projection, activation, up projection, each with its bias.

    Args:
        width: of the hidden states.
        size: of the bottleneck.
        non_linearity: the activation, as the library names it.
        sums_first: the adapter reads the sum with the residual, not the sublayer's output.
        stored: the type of its weights; None means that of the hidden states.
    """

    width: Dim
    size: Dim
    non_linearity: str
    sums_first: bool
    stored: DType | None

    def weights(self) -> tuple[Weight, ...]:
        """Return the two projections.

        Shapes:
            adapter_down  [d, h] and [d]
            adapter_up    [h, d] and [h]

        Source: adapters, methods/modeling.py, Adapter.__init__.
        """
        source = Cite("adapters", "methods/modeling.py, Adapter.__init__")
        shapes = {
            "adapter_down.0.weight": (self.size, self.width),
            "adapter_down.0.bias": (self.size,),
            "adapter_up.weight": (self.width, self.size),
            "adapter_up.bias": (self.width,),
        }
        stored = self.stored or self.dtype
        return tuple(
            Weight(name, shape, stored, self.trainable, source=source)
            for name, shape in shapes.items()
        )

    def join(self, run: Any, output: Tensor, residual_input: Tensor) -> Tensor:
        """Run the adapter on a sublayer's output and add the residual; its names live as there.

        Source: adapters, methods/bottleneck.py, BottleneckLayer.bottleneck_layer_forward;
        methods/modeling.py, Adapter.pre_forward, forward and post_forward.
        """
        with run.tape.module(self.name):
            hidden = output
            if self.sums_first:
                hidden = ops.add(hidden, residual_input, "sum before the adapter")
            # `_up` is in the state that lives until the layer has returned.
            hidden, _up = self._adapt(run, hidden, output)
            return ops.add(hidden, residual_input, "residual")

    def _adapt(self, run: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        down_weight, down_bias, up_weight, up_bias = (
            run.param(self.name, each) for each in self.weights()
        )
        autocasting = run.tape.autocast is not None and run.tape.autocast_enabled
        if x.dtype is not down_weight.dtype and not autocasting:
            raise InvalidRequestError(
                f"the adapters are {down_weight.dtype.label} and read {x.dtype.label} hidden "
                "states, which torch refuses; choose adapter_dtype 'base', or autocast"
            )
        with run.tape.module("adapter_down"):
            down = activate(ops.linear(x, down_weight, down_bias, self.size), self.non_linearity)
        with run.tape.module("adapter_up"):
            up = ops.linear(down, up_weight, up_bias, self.width)
        up = ops.scale(up, "scaled update")
        return ops.add(up, residual, "sum with the adapter's residual"), up


class BottleneckMethod(Method, frozen=True):
    """A method that puts bottleneck adapters behind sublayers and freezes all else.

    Args:
        sites: the library's names of the places.
        sums_first: as in `Bottleneck`.
    """

    sites: ClassVar[tuple[str, ...]]
    sums_first: ClassVar[bool]

    reduction_factor: Annotated[
        float, Meta(gt=0, le=1e6, description="Hidden size over the size of the bottleneck.")
    ] = 16.0
    adapter_dtype: Literal["float32", "base"] = "base"

    @property
    def activation(self) -> str:
        """The activation inside the bottleneck."""
        raise NotImplementedError

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and adapters in each layer.

        Raises:
            UnsupportedCombinationError: a family that the library has no layers for.

        Source: adapters, methods/bottleneck.py, BottleneckLayer.add_adapter (size).
        """
        spec = run.spec
        if spec.model_type not in FAMILIES:
            raise UnsupportedCombinationError(
                f"bottleneck adapters have no source for {spec.model_type} models here yet; they "
                f"are known for {', '.join(FAMILIES)}; use method 'lora'"
            )
        size = max(1, int(spec.hidden.value // self.reduction_factor))
        added = tuple(
            Bottleneck(
                name=site,
                width=spec.hidden,
                size=dim("d", size),
                non_linearity=self.activation,
                sums_first=self.sums_first,
                stored=DType.FLOAT32 if self.adapter_dtype == "float32" else None,
            )
            for site in self.sites
        )

        def with_adapters(kind: LayerKind) -> LayerKind:
            return replace(kind, modules=(*kind.modules, *added))

        frozen = spec.map_modules(_frozen)
        kinds = tuple(with_adapters(kind) for kind in frozen.kinds)
        return replace(run, spec=replace(frozen, kinds=kinds))


def _frozen(module: Module) -> Module:
    return replace(module, trainable=False, trainable_bias=False)
