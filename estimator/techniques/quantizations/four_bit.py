"""4-bit weights as bitsandbytes stores and multiplies them."""

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.ops import F32
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Tensor
from estimator.model.forward import Forward
from estimator.model.loading import Loading
from estimator.model.spec import Linear, Weight, Wrapper
from estimator.sources import Cite
from estimator.techniques.quantization import BitsAndBytes

DTYPES: Final = {each.label: each for each in DType}
BLOCK = 64
ABSMAX_BLOCK = 256
_MATMUL = Cite("bitsandbytes", "autograd/_functions.py, MatMul4Bit")
_STATE = Cite("bitsandbytes", "functional.py, quantize_4bit")


class FourBit(Struct, frozen=True):
    """A weight in blocks of 64 values of 4 bits, each block with a scale.

    Args:
        double_quant: the scales are quantized too, in blocks of 256.
        stored: the type that the weight had, and has again when dequantized.
        compute: the type in which products are made.
        storage: the type of the tensor that the packed values fill; FSDP wants a floating one.
    """

    wrapper: ClassVar[Wrapper] = Wrapper(clones=True, converts="update")

    double_quant: bool
    stored: DType
    compute: DType
    storage: DType = DType.UINT8

    @property
    def adapter_dtype(self) -> DType | None:
        """The type in which PEFT puts adapters beside it, if the packed tensor is floating."""
        return None if self.storage is DType.UINT8 else self.storage

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the packed weight and its quantization state.

        Shapes:
            packed               [in·out / 2]         1 byte; half or a quarter as many wider ones
            absmax               [in·out / 64]        4 bytes, or 1 byte with double quantization
            absmax of absmax     [in·out / 64 / 256]  4 bytes
            code, code of absmax [16], [256]          4 bytes
            offset               [1]                  4 bytes

        Source: dettmers2023, section 3; bitsandbytes, functional.py, quantize_4bit.
        """
        count = linear.weight().parameters
        blocks = -(-count // BLOCK)
        held = (count + 1) // (2 * self.storage.width)
        packed = Weight("weight", _flat(held), self.storage, False, count, _STATE)
        code = _part("weight.code", 16, F32)
        if not self.double_quant:
            return packed, _part("weight.absmax", blocks, F32), code
        return (
            packed,
            _part("weight.absmax", blocks, DType.UINT8),
            _part("weight.nested_absmax", -(-blocks // ABSMAX_BLOCK), F32),
            _part("weight.nested_code", 256, F32),
            _part("weight.offset", 1, F32),
            code,
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Multiply in the compute type, return the input's type, save only the packed weight.

        Backward dequantizes the whole weight for each product, forward does so for more tokens
        than its fused kernel takes: forward to the compute type, backward to the type that the
        weight had, which is then cast.

        Shapes:
            input, output        [b, s, in], [b, s, out]  in the compute type
            dequantized weight   [out, in]                while it is multiplied
            absmax               [in·out / 64]            4 bytes, with double quantization; twice
                                                          in forward, before and after its offset

        Source: bitsandbytes, nn/modules.py, Linear4bit.forward; backends/cuda/ops.py,
        _gemm_4bit_custom_max_m and _dequant_linear_fallback; autograd/_functions.py,
        MatMul4Bit.backward; functional.py, dequantize_4bit.
        """
        tape = run.tape
        given = ops.cast(x, self.compute, "input in the compute type")
        weight, blocks = linear.weight().shape, _flat(-(-linear.weight().parameters // BLOCK))
        held = []
        if tape.regime.dequantizes:
            if self.double_quant:
                held = [tape.new("absmax", blocks, F32, _MATMUL) for _ in ("as it was", "shifted")]
            held.append(tape.new("dequantized weight", weight, self.compute, _MATMUL))
        shape = (*x.shape[:-1], linear.fan_out)
        out = tape.new("output", shape, self.compute, _MATMUL)
        held.clear()

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            scales = [node.scratch("absmax", blocks, F32, _STATE)] if self.double_quant else []
            whole = [node.scratch("dequantized weight", weight, self.stored, _STATE)]
            scales.clear()
            if self.stored is not self.compute:
                whole.append(node.scratch("its cast", weight, self.compute, _MATMUL))
                del whole[0]
            grad = node.new_grad(0, source=_MATMUL)
            whole.clear()
            return (grad,)

        tape.record("matmul_4bit", (given,), (), rule, out)
        return ops.cast(out, x.dtype, "output in the input's type")

    def quantize(self, log: Loading, linear: Linear) -> None:
        """Pack a weight that is on the device.

        Shapes:
            absmax, shifted   [in·out / 64]  4 bytes, with double quantization

        Source: bitsandbytes, functional.py, quantize_4bit and quantize_blockwise; what they call in
        backends/cuda/ops.py.
        """
        packed, absmax, *rest = self.weights(linear)
        scales = -(-linear.weight().parameters // BLOCK) * F32.width
        if not self.double_quant:
            for part in (absmax, packed, *rest):
                _kept(log, linear, part)
            return
        nested_absmax, nested_code, offset, code = rest
        largest = log.scratch("absmax", scales)
        for part in (packed, code, offset):
            _kept(log, linear, part)
        shifted = log.scratch("absmax, shifted", scales)
        for part in (nested_absmax, absmax, nested_code):
            _kept(log, linear, part)
        log.drop(shifted, largest)

    def dequantize(self, run: Forward, linear: Linear) -> Tensor:
        """Return the whole weight in the type that it had.

        Source: bitsandbytes, functional.py, dequantize_4bit.
        """
        blocks = _flat(-(-linear.weight().parameters // BLOCK))
        scales = [run.tape.new("absmax", blocks, F32, _STATE)] if self.double_quant else []
        whole = run.tape.new("dequantized weight", linear.weight().shape, self.stored, _STATE)
        scales.clear()
        return whole


def _kept(log: Loading, linear: Linear, part: Weight) -> tuple[int, ...]:
    return (log.new(f"{linear.name}.{part.name}", part.bytes),)


def _flat(count: int) -> tuple[Dim]:
    return (dim("n", count),)


def _part(name: str, count: int, dtype: DType) -> Weight:
    return Weight(name, _flat(count), dtype, False, 0, _STATE)


class FourBitQuantization(BitsAndBytes, frozen=True):
    """Store every linear layer but the head in 4 bits; optionally raise the rest to fp32."""

    source: ClassVar[Cite] = Cite("dettmers2023", "section 3")

    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quant_storage: Annotated[
        Literal["uint8", "bfloat16", "float16", "float32"],
        Meta(description="Type that 4-bit weights are packed into."),
    ] = "uint8"

    def format(self, stored: DType) -> FourBit:
        """Return the packing of one linear layer."""
        compute, storage = DTYPES[self.compute_dtype], DTYPES[self.quant_storage]
        return FourBit(self.double_quant, stored, compute, storage)


class Nf4(FourBitQuantization, frozen=True, tag="nf4"):
    """4-bit NormalFloat (bitsandbytes)."""


class Fp4(FourBitQuantization, frozen=True, tag="fp4"):
    """4-bit floats (bitsandbytes)."""
