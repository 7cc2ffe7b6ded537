"""8-bit weights as torchao stores and multiplies them: Int8WeightOnlyConfig."""

from typing import Any, ClassVar, Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.tensor import Node, Tensor, reshaped, view
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, ModelSpec, Weight, Wrapper
from estimator.sources import Cite
from estimator.techniques.quantization import Skipping

_INT8: Final = "quantization/quantize_/workflows/int8/int8_tensor.py"
_STATE: Final = Cite("torchao", f"{_INT8}, Int8Tensor.from_hp")
_LINEAR: Final = Cite("torchao", f"{_INT8}, aten.linear.default")


class WeightOnly(Struct, frozen=True):
    """A weight of 8-bit integers with a scale for each row; products are made in floats.

    Args:
        stored: the type that the weight had, and says that it still has.
    """

    wrapper: ClassVar[Wrapper] = Wrapper()

    stored: DType

    @property
    def adapter_dtype(self) -> DType | None:
        """The type in which PEFT puts adapters beside it."""
        return self.stored

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the integers, their scales and their zero points.

        Shapes:
            qdata       [out, in]  1 byte
            scale       [out, 1]   4 bytes
            zero_point  [out, 1]   1 byte

        Source: torchao, quantization/quantize_/workflows/int8/int8_tensor.py, Int8Tensor.from_hp.
        """
        count, rows = linear.weight().parameters, (linear.fan_out,)
        return (
            Weight("weight", (linear.fan_out, linear.fan_in), DType.INT8, False, count, _STATE),
            Weight("weight.scale", rows, DType.FLOAT32, False, 0, _STATE),
            Weight("weight.zero_point", rows, DType.INT8, False, 0, _STATE),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Turn the integers into floats, multiply, scale.

        Autograd does not know that the floats can be made again: it saves them for the gradient of
        the input, for every layer, so that a packed model is held in floats from forward on.

        Shapes:
            weight in floats  [in, out]     in the input's type, or that of autocast; saved
            product           [b, s, out]   while it is scaled
            scale             [out]         in the product's type; saved
            output            [b, s, out]

        Source: torchao, quantization/quantize_/workflows/int8/int8_tensor.py, aten.linear.default.
        """
        tape = run.tape
        half = ops.autocast_to_half(x)
        given = [tape.new("weight in floats", linear.weight().shape, x.dtype, _LINEAR)]
        matrix = ops.autocast_to_half(given[0])
        product = Tensor(tape, (*x.shape[:-1], linear.fan_out), half.dtype, None)

        def into_input(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
            grad = node.new_grad(0, source=_LINEAR)
            return (reshaped(grad, grad.shape),)

        tape.record("linear", (half,), (matrix,), into_input, product)
        tape.allocate(product, "product", _LINEAR)
        del matrix, half
        given.clear()
        scale = Tensor(tape, (linear.fan_out,), product.dtype, None)
        if product.dtype is not DType.FLOAT32:
            tape.allocate(scale, "scale in the product's type", _LINEAR)
        out = Tensor(tape, product.shape, product.dtype, None)

        def scaled(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
            return (node.new_grad(0, source=_LINEAR),)

        kept = scale if scale.storage is not None else None
        tape.record("scale", (product,), (kept,), scaled, out)
        tape.allocate(out, "output", _LINEAR)
        return ops.cast(view(out, out.shape), x.dtype, "output in the input's type")


class TorchaoInt8(Skipping, frozen=True, tag="torchao_int8"):
    """8-bit integers that are multiplied as floats (torchao's Int8WeightOnlyConfig)."""

    source: ClassVar[Cite] = Cite("torchao", "quantization/quant_api.py, Int8WeightOnlyConfig")

    def format(self, stored: DType) -> WeightOnly:
        """Return the packing of one linear layer."""
        return WeightOnly(stored)

    def packs(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a layer is packed: every `nn.Linear` that is not left out, GPT-2's Conv1D not.

        Raises:
            UnsupportedCombinationError: a layer that multiplies by its weight itself, which
                torchao's tensor does not know.

        Source: hf-library, quantizers/quantizer_torchao.py, param_needs_quantization.
        """
        if linear.spelled_out:
            raise UnsupportedCombinationError(
                f"the layers of {spec.model_type} multiply by their weight themselves, which a "
                "torchao int8 tensor does not support; use bf16 weights"
            )
        return not linear.transposed and not self.skips(linear, spec)

    def notes(self) -> tuple[str, ...]:
        """Say what surprises."""
        return (
            "torchao_int8: autograd saves every layer's weight as floats, so without activation "
            "checkpointing the packed weights save nothing during backward",
        )
