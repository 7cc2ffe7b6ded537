"""DoRA: LoRA with a trained magnitude for each output, over the norm of the adapted weight."""

from __future__ import annotations

from typing import Any, Union

from estimator.dtypes import DType, promote
from estimator.eager import ops
from estimator.eager.size import ONE
from estimator.eager.tensor import Node, Param, Tensor, view
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Weight
from estimator.sources import Cite
from estimator.techniques.lora_adapter import LoraAdapter

_LAYER = Cite("peft", "tuners/lora/dora.py, DoraLinearLayer.forward")
_NORM = Cite("peft", "tuners/lora/dora.py, DoraLinearLayer.get_weight_norm")
_EYE = Cite("peft", "tuners/lora/dora.py, DoraLinearLayer.get_lora_weight")


class DoraAdapter(LoraAdapter, frozen=True):
    """A LoRA adapter with a magnitude vector.

    While the layer runs forward, PEFT makes the whole product BA by sending an identity matrix
    through A and B, and the whole adapted weight to take its norm; they die with the layer.

    Shapes:
        identity                 [in, in]     the width of A
        BA                       [in, out]    the same
        base weight, if cast     [out, in]    the width of the adapter's input
        scaled BA, adapted weight [out, in]   the same, for a moment
        base output, lora output [b, s, out]  saved for backward

    Source: liu2024dora, section 4; peft, tuners/lora/dora.py, DoraLinearLayer.
    """

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return A, B and the magnitude [out]."""
        down, up = super().weights(linear)
        source = Cite("liu2024dora", "equation 5, m")
        return down, up, Weight(
            "lora_magnitude_vector.weight", (linear.fan_out,), down.dtype, True, source=source
        )  # fmt: skip

    def added(
        self, run: Forward, linear: Linear, x: Tensor, result: Tensor, converts: str
    ) -> Tensor:
        """Return the base's output with DoRA added to it.

        With dropout the base is run once more, on what dropout left of its input.

        Source: peft, tuners/lora/variants.py, DoraLinearVariant.forward.
        """
        base_result = None if self.dropout else result
        x = ops.dropout(x, self.dropout)
        out_dtype = result.dtype
        result = ops.add(result, self._scaled(run, linear, x, base_result), "sum with DoRA")
        return ops.cast(result, out_dtype, "sum cast back") if converts else result

    def _scaled(
        self, run: Forward, linear: Linear, x: Tensor, base_result: Tensor | None
    ) -> Tensor:
        """Return what DoRA adds; every local name lives until it returns, as it does there."""
        lora_weight = self._lora_weight(run, linear)
        lora_weight = ops.cast(lora_weight, x.dtype)
        weight = _base_weight(run, linear)
        weight = _cast(run, weight, x.dtype)
        weight_norm = _weight_norm(run, linear, weight, lora_weight)
        scale = self._magnitude_over(run, linear, weight_norm)
        lora_result = self.product(run, linear, x)
        if base_result is None:
            base_result = _again(run, linear, x, weight)
        elif linear.bias:
            base_result = _without_bias(run, linear, base_result)
        return ops.add(
            ops.mul(ops.shift(scale, "magnitude less one"), base_result, "rescaled base"),
            ops.scale(ops.mul(scale, lora_result, "rescaled update"), "scaled update"),
        )

    def _lora_weight(self, run: Forward, linear: Linear) -> Tensor:
        """Return BA, made by running A and B on an identity matrix."""
        down, *_ = self.weights(linear)
        eye = run.tape.new("identity", (linear.fan_in, linear.fan_in), down.dtype, _EYE)
        return view(self.product(run, linear, eye), (linear.fan_out, linear.fan_in))

    def _magnitude_over(self, run: Forward, linear: Linear, norm: Tensor) -> Tensor:
        """Return `magnitude / norm` as a row; saves the norm."""
        magnitude = run.param(linear.name, self.weights(linear)[2])
        dtype = promote(magnitude.dtype, norm.dtype)
        out = run.tape.new("magnitude over norm", norm.shape, dtype, _LAYER)

        def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
            return (node.new_grad(0),)

        run.tape.record("div", (magnitude,), (norm,), rule, out)
        return view(out, (ONE, linear.fan_out))


Stored = Union[Tensor, Param]


def _base_weight(run: Forward, linear: Linear) -> Stored:
    """Return the base weight, dequantized if it is packed.

    Source: peft, utils/integrations.py, dequantize_module_weight.

    Raises:
        UnsupportedCombinationError: a format that has no source here.
    """
    if linear.format is None:
        return run.param(linear.name, linear.weight())
    dequantize = getattr(linear.format, "dequantize", None)
    if dequantize is None:
        raise UnsupportedCombinationError(
            "DoRA over this quantization has no sourced answer here yet; use nf4 or fp4"
        )
    weight: Tensor = dequantize(run, linear)
    return weight


def _cast(run: Forward, weight: Stored, dtype: DType) -> Stored:
    """Return a frozen weight in another type; nothing of it is saved."""
    if weight.dtype is dtype:
        return weight
    return run.tape.new("base weight, cast", weight.shape, dtype, _LAYER)


def _weight_norm(run: Forward, linear: Linear, weight: Stored, lora_weight: Tensor) -> Tensor:
    """Return the norm of each row of the adapted weight; no graph is built."""
    tape, shape = run.tape, lora_weight.shape
    scaled = tape.new("scaled BA", shape, lora_weight.dtype, _NORM)
    adapted = tape.new("adapted weight", shape, promote(weight.dtype, scaled.dtype), _NORM)
    del scaled
    return tape.new("weight norm", (linear.fan_out,), adapted.dtype, _NORM)


def _again(run: Forward, linear: Linear, x: Tensor, weight: Stored) -> Tensor:
    """Run the base once more without its bias; a weight that was cast is saved for backward."""
    if isinstance(weight, Param):
        return ops.linear(x, weight, None, linear.fan_out)
    half, matrix = ops.autocast_to_half(x), ops.autocast_to_half(weight)
    out = run.tape.new("base output again", (*x.shape[:-1], linear.fan_out), half.dtype, _LAYER)

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
        return (node.new_grad(0),)

    run.tape.record("linear", (half,), (matrix,), rule, out)
    return out


def _without_bias(run: Forward, linear: Linear, base_result: Tensor) -> Tensor:
    """Return `base_result - bias`."""
    vector = linear.bias_weight()
    assert vector is not None
    bias = run.param(linear.name, vector)
    dtype = promote(base_result.dtype, bias.dtype)
    out = run.tape.new("base output without bias", base_result.shape, dtype, _LAYER)

    def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad, node.new_grad(1, grad.shape) if node.wants(1) else None

    run.tape.record("sub", (base_result, bias), (), rule, out)
    return out
