"""LoRA: trainable matrices A [r, in] and B [out, r] beside frozen linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Tensor
from estimator.errors import InvalidRequestError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Module, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.stage import Stage


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
        """Return the type of A and B; beside packed weights they stay in fp32, as created."""
        if self.dtype is not None or linear.format is not None:
            return self.dtype or DType.FLOAT32
        return linear.dtype

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return `base(x) + B(A(dropout(x))) * scaling` in the base's type.

        Every adapted layer casts its input to the type of A on its own.

        Source: peft, tuners/lora/layer.py, Linear.forward; tuners/lora/bnb.py, Linear4bit.forward.
        """
        result = run.base_linear(x, linear)
        out_dtype = result.dtype
        packed = linear.format is not None
        if packed:
            result = ops.copy(result, name="clone of the base output")
        autocasting = run.tape.autocast is not None and run.tape.autocast_enabled
        if not (packed and autocasting):
            x = ops.cast(x, self.weights(linear)[0].dtype, "input cast for the adapter")
        result = ops.add(result, self._update(run, linear, x, out_dtype if packed else None))
        return ops.cast(result, out_dtype, "sum cast back")

    def _update(self, run: Forward, linear: Linear, x: Tensor, out_dtype: DType | None) -> Tensor:
        down, up = self.weights(linear)
        with run.tape.module("lora_A"):
            hidden = ops.linear(
                ops.dropout(x, self.dropout), run.param(linear.name, down), None, dim("r", self.r)
            )
        with run.tape.module("lora_B"):
            update = ops.linear(hidden, run.param(linear.name, up), None, linear.fan_out)
        update = ops.scale(update, "scaled update")
        return update if out_dtype is None else ops.cast(update, out_dtype)


class Lora(Struct, frozen=True):
    """Freeze the model and put adapters beside the targeted layers."""

    stage: ClassVar[Stage] = Stage.ADAPT
    r: int
    dropout: float
    target_modules: tuple[str, ...] | str
    adapter_dtype: DType | None

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and an adapter on each target.

        Raises:
            InvalidRequestError: the targets match no linear layer of the model, as PEFT refuses.
        """
        head = run.spec.head.name
        matches = self._matcher(head)
        linears = {
            each.name: each for each, _ in run.spec.module_counts() if isinstance(each, Linear)
        }
        if not any(matches(name) for name in (*linears, head)):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears if name != head})
            raise InvalidRequestError(
                f"target_modules {list(self.target_modules)} match no linear layer of this "
                f"{run.spec.model_type} model; it has {', '.join(known)}"
            )
        adapter = LoraAdapter(self.r, self.dropout, self.adapter_dtype)

        def adapt(module: Module) -> Module:
            frozen = replace(module, trainable=False)
            if isinstance(frozen, Linear) and matches(frozen.name):
                return replace(frozen, adapter=adapter)
            return frozen

        return replace(run, spec=run.spec.map_modules(adapt))

    def _matcher(self, head: str) -> Callable[[str], bool]:
        """Return the test for a targeted name: its own, or its end behind a dot, as in PEFT.

        `all-linear` is every linear layer but the head.

        Source: peft, tuners/tuners_utils.py, check_target_module_exists and
        _maybe_include_all_linear_layers.
        """
        if isinstance(self.target_modules, str):
            return lambda name: name != head
        targets = self.target_modules
        return lambda name: any(name == each or name.endswith(f".{each}") for each in targets)
