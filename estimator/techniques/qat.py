"""Quantization-aware training: linear layers that round weights and inputs, and train in full."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.fake_quantize import fake_quantize
from estimator.eager.ops import F32
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Param, Tensor
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Linear, Module, Weight
from estimator.run import Run
from estimator.section import Kind
from estimator.sources import Cite
from estimator.techniques.fp8 import refuse_unknown
from estimator.techniques.stage import Stage

_STATE: Final = Cite("torchao", "quantization/qat/fake_quantizer.py, IntxFakeQuantizer.forward")


class FakeQuantizedProduct(Struct, frozen=True):
    """The product of a `FakeQuantizedLinear`.

    Args:
        group_size: weights that share a scale.
        rounds_inputs: the input is rounded too, with a scale for each token.
    """

    group_size: int
    rounds_inputs: bool

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the scales and zero points of the weight, which the module keeps.

        Shapes:
            scale       [out, in / group_size]  4 bytes
            zero_point  [out, in / group_size]  4 bytes

        Source: torchao, quantization/qat/fake_quantizer.py, IntxFakeQuantizer.forward.
        """
        shape = (linear.fan_out, dim("groups", linear.fan_in.value // self.group_size))
        return (
            Weight("weight_fake_quantizer.scale", shape, F32, False, 0, _STATE),
            Weight("weight_fake_quantizer.zero_point", shape, DType.INT32, False, 0, _STATE),
        )

    def forward(
        self, run: Forward, weight: Param, bias: Param | None, x: Tensor, out: Dim
    ) -> Tensor:
        """Round input and weight, and multiply as torch's linear does.

        Source: torchao, quantization/qat/linear.py, FakeQuantizedLinear.forward.
        """
        tape = run.tape
        if self.rounds_inputs:
            with tape.module("activation_fake_quantizer"):
                x = fake_quantize(tape, x, x.shape[:-1])
        inner = weight.shape[1].value // self.group_size
        with tape.module("weight_fake_quantizer"):
            matrix = fake_quantize(tape, weight, (weight.shape[0], dim("groups", inner)))
        return ops.linear(x, matrix, bias, out)


class Torchao(Kind, frozen=True, tag="torchao"):
    """Fake-quantized linear layers (torchao's QATConfig with IntxFakeQuantizeConfig).

    Args:
        weight_dtype: integers that weights are rounded to; costs no memory.
        activation_dtype: integers that inputs are rounded to, token by token; None: they are not.
        group_size: weights that share a scale.
    """

    stage: ClassVar[Stage] = Stage.KERNEL
    source: ClassVar[Cite] = Cite("torchao", "quantization/qat/linear.py, FakeQuantizedLinear")

    weight_dtype: Annotated[
        Literal["int4", "int8"], Meta(description="Integers of the weights; costs no memory.")
    ] = "int4"
    activation_dtype: Annotated[
        Literal["int8"] | None, Meta(description="Integers of the inputs; none: not rounded.")
    ] = "int8"
    group_size: Annotated[
        int, Meta(ge=1, le=65_536, description="Weights that share a scale in QAT.")
    ] = 32

    def apply(self, run: Run) -> Run:
        """Take over every linear layer, the head too.

        Raises:
            UnsupportedCombinationError: adapters or quantized weights.
            InvalidRequestError: rows that the groups do not divide, as torchao refuses.

        Source: torchao, quantization/qat/api.py, _qat_config_transform.
        """
        refuse_unknown(run, "qat")
        if self.group_size == 1:
            raise InvalidRequestError("qat: torchao takes groups of two weights or more")
        product = FakeQuantizedProduct(self.group_size, self.activation_dtype is not None)
        count = 0

        def convert(module: Module) -> Module:
            if not isinstance(module, Linear) or module.transposed:
                return module
            if module.adapter is not None or module.product is not None:
                raise UnsupportedCombinationError(
                    "qat with adapters or fp8 has no sourced answer here yet; use method full"
                )
            if module.fan_in.value % self.group_size:
                raise InvalidRequestError(
                    f"qat: the {module.fan_in.value} inputs of {module.name} are no multiple of "
                    f"group_size {self.group_size}; choose another group_size"
                )
            return replace(module, product=product)

        spec = run.spec.map_modules(convert)
        for module, times in (*spec.module_counts(), *(((spec.head, 1),) if spec.tied else ())):
            count += times if isinstance(module, Linear) and module.product is not None else 0
        if product.rounds_inputs:
            shape = (dim("layers", count), BATCH, SEQ)
            kept = (
                Buffer("scales of the inputs", shape, F32),
                Buffer("zero points of the inputs", shape, DType.INT32),
            )
            spec = replace(spec, buffers=(*spec.buffers, *kept))
        return replace(run, spec=spec)
