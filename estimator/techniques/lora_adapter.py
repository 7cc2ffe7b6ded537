"""What LoRA puts beside one linear layer: A, B, and the operators that they run."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Product, Weight, Wrapper
from estimator.sources import Cite

_BIAS = Cite("peft", "tuners/lora/layer.py, LoraLayer.update_layer, lora_bias")
_PLAIN: Final = Wrapper()


class LoraAdapter(Struct, frozen=True):
    """The adapter of one linear layer.

    Args:
        dtype: how A and B are stored; None means as the base weights are.
        bias: B has a bias of its own.
        down_product, up_product: how A and B multiply, if other than as torch's linear does.
    """

    r: int
    dropout: float
    dtype: DType | None
    bias: bool = False
    down_product: Product | None = None
    up_product: Product | None = None

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return A and B, and the bias of B if there is one.

        Shapes:
            A  [r, in]
            B  [out, r]
            bias of B [out], with `lora_bias`

        Source: hu2021, section 4.1; peft, tuners/lora/layer.py, LoraLayer.update_layer.
        """
        rank, stored = dim("r", self.r), self._stored(linear)
        source = Cite("hu2021", "section 4.1, W0 + BA")
        bias = Weight("lora_B.bias", (linear.fan_out,), stored, True, source=_BIAS)
        return (
            Weight("lora_A.weight", (rank, linear.fan_in), stored, True, source=source),
            Weight("lora_B.weight", (linear.fan_out, rank), stored, True, source=source),
            *((bias,) if self.bias else ()),
        )

    def _stored(self, linear: Linear) -> DType:
        """Return the type of A and B; beside packed integers they stay in fp32, as created."""
        if self.dtype is not None:
            return self.dtype
        if linear.format is not None:
            return linear.format.adapter_dtype or DType.FLOAT32
        return linear.dtype

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return `base(x) + B(A(dropout(x))) * scaling` in the base's type.

        Every adapted layer casts its input to the type of A on its own.

        Source: peft, tuners/lora/layer.py, Linear.forward; tuners/lora/bnb.py, Linear4bit.forward
        and Linear8bitLt.forward.
        """
        result = run.base_linear(x, linear)
        out_dtype = result.dtype
        wrapper = linear.format.wrapper if linear.format is not None else _PLAIN
        if wrapper.clones:
            result = ops.copy(result, name="clone of the base output")
        autocasting = run.tape.autocast is not None and run.tape.autocast_enabled
        converts = "" if autocasting and wrapper.converts != "sum always" else wrapper.converts
        if converts:
            x = run.cast_for_adapter(x, self.weights(linear)[0].dtype, linear.name)
        result = self.added(run, linear, x, result, converts)
        return ops.cast(result, out_dtype, "sum cast back") if "sum" in converts else result

    def added(
        self, run: Forward, linear: Linear, x: Tensor, result: Tensor, converts: str
    ) -> Tensor:
        """Return the base's output with the update added to it."""
        update = self._update(run, linear, x, result.dtype, converts)
        if linear.format is not None and linear.format.wrapper.in_place:
            return ops.add_to_view(result, update, "sum in place")
        return ops.add(result, update)

    def _update(
        self, run: Forward, linear: Linear, x: Tensor, out_dtype: DType, converts: str
    ) -> Tensor:
        update = self.product(run, linear, x, self.dropout)
        if converts == "unscaled update":
            update = ops.cast(update, out_dtype)
        update = ops.scale(update, "scaled update")
        return ops.cast(update, out_dtype) if converts == "update" else update

    def product(self, run: Forward, linear: Linear, x: Tensor, dropout: float = 0.0) -> Tensor:
        """Return `B(A(dropout(x)))`."""
        down, up, *rest = self.weights(linear)
        bias = run.param(linear.name, rest[0]) if self.bias else None
        with run.tape.module("lora_A"):
            matrix, rank = run.param(linear.name, down), dim("r", self.r)
            dropped = ops.dropout(x, dropout)
            if self.down_product is not None:
                hidden = self.down_product.forward(run, matrix, None, dropped, rank)
            else:
                hidden = ops.linear(dropped, matrix, None, rank)
            del dropped
        with run.tape.module("lora_B"):
            matrix = run.param(linear.name, up)
            if self.up_product is not None:
                return self.up_product.forward(run, matrix, bias, hidden, linear.fan_out)
            return ops.linear(hidden, matrix, bias, linear.fan_out)
