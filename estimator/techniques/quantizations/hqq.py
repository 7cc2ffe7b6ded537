"""Weights as HQQ stores them, and how its PyTorch backend multiplies while training."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final

from msgspec import Meta, Struct

from estimator.dtypes import DType
from estimator.eager.size import Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, ModelSpec, Weight, Wrapper
from estimator.sources import Cite
from estimator.techniques.method import Method
from estimator.techniques.quantization import UNSEEN, Quantization

_STATE: Final = Cite("hqq", "core/quantize.py, Quantizer.quantize")
_DEQUANTIZE: Final = Cite("hqq", "core/quantize.py, Quantizer.dequantize")
_PRODUCT: Final = Cite("hqq", "core/quantize.py, HQQMatmulNoCacheMul")
# Values in one element of the packed tensor, and its type: bitpack.py, BitPack.
PACKING: Final = {
    8: (1, DType.UINT8),
    4: (2, DType.UINT8),
    3: (10, DType.INT32),
    2: (4, DType.UINT8),
    1: (8, DType.UINT8),
}

New = Callable[[str, Shape, DType, Cite], Tensor]


class Hqq(Struct, frozen=True):
    """A weight in groups of neighbours, each with a scale and a zero point in the compute type.

    Args:
        compute: the type that the weight had, and has again when dequantized.
        by_input: a group lies along a row of the packed tensor (axis 1), or down a column.
    """

    wrapper: ClassVar[Wrapper] = Wrapper(converts="sum")
    adapter_dtype: ClassVar[DType | None] = None

    bits: int
    group: int
    by_input: bool
    compute: DType

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the packed weight, the scales and the zero points.

        Shapes, for groups of g values in axis 1:
            W_q          [in·out / g / values in an element, g]  1 byte; 4 bytes for 3 bits
            scale, zero  [in·out / g]                            2 bytes, 4 with fp32

        Source: hqq, core/quantize.py, Quantizer.quantize; core/bitpack.py, BitPack.
        """
        count = linear.weight().parameters
        groups = (dim("groups", count // self.group),)
        return (
            Weight("W_q", self._packed(count), PACKING[self.bits][1], False, count, _STATE),
            Weight("scale", groups, self.compute, False, 0, _STATE),
            Weight("zero", groups, self.compute, False, 0, _STATE),
        )

    def _packed(self, count: int) -> tuple[Dim, Dim]:
        rows, columns = self.rows(count), count // self.rows(count)
        return dim("packed", -(-rows // PACKING[self.bits][0])), dim("columns", columns)

    def rows(self, count: int) -> int:
        """Return the rows of the tensor that is packed row upon row."""
        return count // self.group if self.by_input else self.group

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Dequantize step by step, multiply; the input is saved, though nothing needs it.

        Shapes, in forward and again in backward:
            unpacked codes         [in, out]      in the compute type
            masked, shifted codes  [in, out] packed, while they are unpacked
            codes less zero point  [in, out]      in the compute type, beside the codes
            dequantized weight     [in, out]      the same, beside both; then alone
            output                 [b, s, out]    in the compute type

        Raises:
            UnsupportedCombinationError: autocast to another type, which backward does not know.

        Source: hqq, core/quantize.py, HQQMatmulNoCacheMul, HQQLinear.matmul and dequantize.
        """
        tape = run.tape
        dtype = (tape.autocast or x.dtype) if tape.autocast_enabled else x.dtype
        if dtype is not self.compute:
            raise UnsupportedCombinationError(
                f"backward of hqq multiplies {self.compute.label} weights by gradients of type "
                f"{dtype.label}, and does not cast; use an autocast that is the precision, or none"
            )
        whole = [self._dequantized(tape.new, linear)]
        if x.dtype is not dtype:
            whole.append(tape.new("input, cast by autocast", x.shape, dtype, _PRODUCT))
        out = Tensor(tape, (*x.shape[:-1], linear.fan_out), dtype, None)
        tape.result("mm", out, "output", _PRODUCT)
        whole.clear()

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = [self._dequantized(node.scratch, linear)]
            shape, wanted = node.meta_of(0)
            if wanted is dtype:
                grad = node.new_grad(0, source=_PRODUCT)
                whole.clear()
                return (grad,)
            narrow = [node.scratch("gradient before its cast", shape, dtype, _PRODUCT)]
            whole.clear()
            grad = node.new_grad(0, source=_PRODUCT)
            narrow.clear()
            return (grad,)

        tape.record("hqq product", (x,), (x,), rule, out)
        return out

    def _dequantized(self, new: New, linear: Linear) -> Tensor:
        """Return the whole weight; what it was made of dies with this call."""
        count = linear.weight().parameters
        packed, columns = self._packed(count)
        values, stored = PACKING[self.bits]
        unpacked = (dim("rows", packed.value * values), columns)
        codes = new("unpacked codes", unpacked, self.compute, _DEQUANTIZE)
        if values > 1:
            bits = [new("masked codes", (packed, columns), stored, _DEQUANTIZE)]
            bits.append(new("shifted codes", (packed, columns), stored, _DEQUANTIZE))
            bits.clear()
        shape = (linear.fan_out, linear.fan_in)
        shifted = new("codes less zero point", shape, self.compute, _DEQUANTIZE)
        whole = new("dequantized weight", shape, self.compute, _DEQUANTIZE)
        del codes, shifted
        return whole


class HqqQuantization(Quantization, frozen=True, tag="hqq"):
    """Integers in groups, quantized without data: half-quadratic quantization (hqq)."""

    source: ClassVar[Cite] = _STATE
    plain_lora: ClassVar[bool] = True

    bits: Annotated[int, Meta(ge=1, le=8, description="Bits of a packed weight.")] = 4
    group_size: Annotated[int, Meta(ge=-1, le=1024, description="Values that share a scale.")] = 64
    axis: Annotated[int, Meta(ge=0, le=1, description="Axis that groups lie along.")] = 1

    def format(self, stored: DType) -> Hqq:
        """Return the packing of one linear layer.

        Raises:
            UnsupportedCombinationError: bits that hqq stores in whole bytes, a group it refuses.
        """
        if self.bits not in PACKING:
            raise UnsupportedCombinationError(
                f"hqq with bits {self.bits} has no sourced answer here; use bits 8, 4, 3, 2 or 1"
            )
        if self.group_size < 8 or self.group_size % 8:
            raise UnsupportedCombinationError(
                f"hqq takes a group_size that is a multiple of 8, not {self.group_size}"
            )
        return Hqq(self.bits, self.group_size, self.axis == 1, stored)

    def packs(self, linear: Linear, spec: ModelSpec) -> bool:
        """Whether a layer is packed: every `nn.Linear` but the head; no class of a model's own.

        Raises:
            UnsupportedCombinationError: a weight that does not divide into groups or bytes.

        Source: hqq, models/base.py, BasePatch.patch_linearlayers.
        """
        packs = super().packs(linear, spec) and not linear.transposed
        count, layout = linear.weight().parameters, self.format(spec.embeddings[0].dtype)
        even = PACKING[self.bits][0] if self.bits != 3 else 1
        if packs and (count % self.group_size or layout.rows(count) % even):
            raise UnsupportedCombinationError(
                f"hqq cannot pack a weight of {count} values in groups of {self.group_size}; use "
                "another group_size, or nf4"
            )
        return packs

    def refuse(self, method: Method, framework: str, version: str) -> None:
        """Refuse what PEFT's layer does not take.

        Source: peft, tuners/lora/hqq.py, HqqLoraLinear.
        """
        super().refuse(method, framework, version)
        if getattr(method, "lora_bias", False):
            raise UnsupportedCombinationError(
                "PEFT's layer over hqq weights takes no lora_bias; leave it out, or use nf4"
            )

    def notes(self) -> tuple[str, ...]:
        """Say who quantizes, and what surprises."""
        return (
            UNSEEN.format(name=self.name),
            "hqq: transformers 5 does not quantize with HqqConfig; hqq's own "
            "AutoHQQHFModel.quantize_model does, with the model's type as compute_dtype",
            "hqq: its PyTorch backend dequantizes in steps that hold three copies of a weight",
        )
