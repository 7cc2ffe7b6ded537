"""LoRA: trainable matrices A [r, in] and B [out, r] beside frozen linear layers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Weight, Wrapper
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, adapted

_PLAIN: Final = Wrapper()


class LoraAdapter(Struct, frozen=True):
    """The adapter of one linear layer.

    Args:
        dtype: how A and B are stored; None means as the base weights are.
    """

    r: int
    dropout: float
    dtype: DType | None

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return A and B.

        Shapes:
            A  [r, in]
            B  [out, r]

        Source: hu2021, section 4.1.
        """
        rank, stored = dim("r", self.r), self._stored(linear)
        source = Cite("hu2021", "section 4.1, W0 + BA")
        return (
            Weight("lora_A.weight", (rank, linear.fan_in), stored, True, source=source),
            Weight("lora_B.weight", (linear.fan_out, rank), stored, True, source=source),
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
            x = ops.cast(x, self.weights(linear)[0].dtype, "input cast for the adapter")
        result = ops.add(result, self._update(run, linear, x, out_dtype, converts))
        return ops.cast(result, out_dtype, "sum cast back") if "sum" in converts else result

    def _update(
        self, run: Forward, linear: Linear, x: Tensor, out_dtype: DType, converts: str
    ) -> Tensor:
        down, up = self.weights(linear)
        with run.tape.module("lora_A"):
            hidden = ops.linear(
                ops.dropout(x, self.dropout), run.param(linear.name, down), None, dim("r", self.r)
            )
        with run.tape.module("lora_B"):
            update = ops.linear(hidden, run.param(linear.name, up), None, linear.fan_out)
        if converts == "unscaled update":
            update = ops.cast(update, out_dtype)
        update = ops.scale(update, "scaled update")
        return ops.cast(update, out_dtype) if converts == "update" else update


class Lora(Method, frozen=True, tag="lora"):
    """Train low-rank adapters beside frozen linear layers (PEFT's LoraConfig)."""

    peft: ClassVar[str | None] = "LoraConfig"
    source: ClassVar[Cite] = Cite("hu2021", "section 4.1, W0 + BA")

    r: Annotated[int, Meta(ge=1, le=65_536)] = 16
    lora_alpha: Annotated[float, Meta(gt=0, le=1e9)] = 16.0
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Names = "all-linear"
    modules_to_save: Names = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    adapter_dtype: Literal["float32", "base"] = "float32"

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and an adapter on each target."""
        stored = DType.FLOAT32 if self.adapter_dtype == "float32" else None
        adapter = LoraAdapter(self.r, self.lora_dropout, stored)
        return replace(run, spec=adapted(run.spec, self.target_modules, lambda _: adapter))
