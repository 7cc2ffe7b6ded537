"""8-bit weights as bitsandbytes stores and multiplies them: LLM.int8()."""

from typing import Annotated, Any, ClassVar, Final

from msgspec import Meta, Struct

from estimator.dtypes import DType
from estimator.eager.tensor import Node, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.loading import Loading
from estimator.model.spec import Linear, Weight, Wrapper
from estimator.sources import Cite
from estimator.techniques.quantization import BitsAndBytes

_MATMUL: Final = Cite("bitsandbytes", "autograd/_functions.py, MatMul8bitLt")
_QUANTIZE: Final = Cite("bitsandbytes", "backends/cuda/ops.py, int8_vectorwise_quant")
_DEQUANTIZE: Final = Cite("bitsandbytes", "backends/cuda/ops.py, int8_mm_dequant")
_STATE: Final = Cite("bitsandbytes", "nn/modules.py, Int8Params._quantize")
# cuBLASLt multiplies int8 matrices whose inner dimension is a multiple of 4.
_ALIGNED = 4


class EightBit(Struct, frozen=True):
    """A weight of 8-bit integers, each row with a scale.

    Args:
        decomposes: inputs are searched for outliers (a threshold above zero).
    """

    wrapper: ClassVar[Wrapper] = Wrapper(converts="update")
    adapter_dtype: ClassVar[DType | None] = None

    decomposes: bool = True

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the integers and the largest absolute value of each row.

        Shapes:
            CB   [out, in]  1 byte
            SCB  [out]      4 bytes

        Source: dettmers2022int8, section 2.1, row-wise quantization; bitsandbytes, nn/modules.py,
        Int8Params._quantize.
        """
        count = linear.weight().parameters
        shape = (linear.fan_out, linear.fan_in)
        return (
            Weight("weight", shape, DType.INT8, False, count, _STATE),
            Weight("weight.SCB", (linear.fan_out,), DType.FLOAT32, False, 0, _STATE),
        )

    def quantize(self, log: Loading, linear: Linear) -> None:
        """Round a weight, which comes from the host in fp16.

        Source: bitsandbytes, nn/modules.py, Int8Params._quantize; backends/cuda/ops.py,
        int8_vectorwise_quant.
        """
        integers, scales = self.weights(linear)
        whole = log.scratch("weight in fp16", integers.bytes * DType.FLOAT16.width)
        for part in (scales, integers):
            log.new(f"{linear.name}.{part.name}", part.bytes)
        log.drop(whole)

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Quantize the input by rows, multiply integers, and scale the sums to the input's type.

        The input hangs on the function's context as a plain attribute: neither backward nor
        checkpointing lets it go, only the end of the graph does. Outlier columns are none here.

        Shapes:
            input in fp16      [b, s, in]    2 bytes, while it is quantized
            absolute values    [b, s, in]    2 bytes, while outliers are searched
            outliers           [b, s, in]    1 byte, while the input is quantized
            CA                 [b, s, in]    1 byte, in forward
            SCA                [b, s]        4 bytes, in forward
            int32 products     [b, s, out]   4 bytes, while they are scaled
            fp16 output        [b, s, out]   2 bytes, beside them if the input has another type
            CB in input's type [out, in]     in backward
            scaled SCB         [out]         4 bytes, while CB is multiplied by it

        Raises:
            UnsupportedCombinationError: a width that cuBLASLt does not multiply in integers.

        Source: bitsandbytes, autograd/_functions.py, MatMul8bitLt; backends/cuda/ops.py,
        int8_vectorwise_quant and int8_mm_dequant; backends/default/ops.py, int8_mixed_scaled_mm.
        """
        if linear.fan_in.value % _ALIGNED:
            raise UnsupportedCombinationError(
                f"int8 products over {linear.fan_in.value} inputs are no multiple of {_ALIGNED}, "
                "for which bitsandbytes has another path without a source here; use nf4"
            )
        tape = run.tape
        held = self._quantized(x)
        shape = (*x.shape[:-1], linear.fan_out)
        products = [tape.new("int32 products", shape, DType.INT32, _DEQUANTIZE)]
        if x.dtype is not DType.FLOAT16:
            products.append(tape.new("fp16 output", shape, DType.FLOAT16, _DEQUANTIZE))
        out = tape.new("output", shape, x.dtype, _DEQUANTIZE)
        products.clear()
        kept = x if x.requires_grad else None

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            assert kept is not None
            weight = (linear.fan_out, linear.fan_in)
            whole = [node.scratch("dequantized weight", weight, kept.dtype, _MATMUL)]
            scales = [node.scratch("scaled SCB", weight[:1], DType.FLOAT32, _MATMUL)]
            scales.clear()
            grad = node.new_grad(0, source=_MATMUL)
            whole.clear()
            return (grad,)

        tape.record("matmul_8bit", (x,), (), rule, out)
        held.clear()
        return out

    def _quantized(self, x: Tensor) -> list[Tensor]:
        """Return the integers and scales of an input."""
        tape, half = x.tape, DType.FLOAT16
        given = [] if x.dtype is half else [tape.new("input in fp16", x.shape, half, _MATMUL)]
        scales = tape.new("SCA", x.shape[:-1], DType.FLOAT32, _QUANTIZE)
        codes = tape.new("CA", x.shape, DType.INT8, _QUANTIZE)
        if self.decomposes:
            given.append(tape.new("absolute values", x.shape, half, _QUANTIZE))
            given.append(tape.new("outliers", x.shape, DType.BOOL, _QUANTIZE))
        given.clear()
        return [scales, codes]


class Int8(BitsAndBytes, frozen=True, tag="int8"):
    """8-bit integers with outliers in half precision, LLM.int8() (bitsandbytes)."""

    source: ClassVar[Cite] = Cite("dettmers2022int8", "section 3, LLM.int8()")

    threshold: Annotated[
        float, Meta(ge=0, le=1e6, description="Inputs from here on are outliers; 0: no search.")
    ] = 6.0

    def format(self, stored: DType) -> EightBit:
        """Return the packing of one linear layer."""
        return EightBit(self.threshold > 0)

    def notes(self) -> tuple[str, ...]:
        """Say what depends on the data, and what surprises."""
        kept = (
            "int8: bitsandbytes holds the input of every packed layer until the end of backward; "
            "non-reentrant activation checkpointing does not free it"
        )
        outliers = (
            "int8: how many input columns hold outliers depends on the data; none are counted, and "
            "each would keep one value per token for its layer"
        )
        return (kept, outliers) if self.threshold > 0 else (kept,)
