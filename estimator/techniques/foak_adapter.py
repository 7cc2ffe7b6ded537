"""LoRA as fms-acceleration fuses it over quantized weights: one function for a group of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import Dim, Shape, dim
from estimator.eager.tensor import Node, Param, Tensor, reshaped
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear
from estimator.sources import Cite
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.quantizations.four_bit import BLOCK, FourBit
from estimator.techniques.quantizations.gptq import GptqTriton

GROUPS: Final = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)
_BNB: Final = Cite("fms-foak", "fused_ops/unsloth_lora/bnb/fast_lora.py, LoRA_QKV and LoRA_W")
_GPTQ: Final = Cite("fms-foak", "fused_ops/unsloth_lora/gptq/fast_lora.py, LoRA_QKV and LoRA_W")

New = Callable[[str, Shape, DType, Cite], Tensor]


def refusal(linear: Linear) -> str | None:
    """Return what keeps an adapted layer from being fused, if anything does."""
    adapter, packing = linear.adapter, linear.format
    if type(adapter) is not LoraAdapter or adapter.bias:
        return "plain LoRA without a bias of B"
    if isinstance(packing, FourBit):
        plain = packing.double_quant and packing.storage is DType.UINT8
        return None if plain else "double quantization and quant_storage uint8"
    if isinstance(packing, GptqTriton):
        return None
    return "nf4, fp4, or gptq with kernel 'autogptq_triton'"


class FusedAdapter(LoraAdapter, frozen=True, kw_only=True):
    """The adapter of a layer that is computed together with others of its group.

    Args:
        group: the layers that the first call computes.
    """

    group: tuple[str, ...]

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return this layer's output; the first call of a group makes those of all.

        Shapes, in forward:
            dequantized weight    [in, out]    over GPTQ those of the whole group at once
            output                [b, s, out]
            input after dropout   [b, s, in]   for each layer; saved, as the input is
            dropout mask          [b, s, in]   1 byte, for a moment
            update                [b, s, out]  while it is added

        Raises:
            UnsupportedCombinationError: the input is not of autocast's type.

        Source: fms-foak, fused_ops/unsloth_lora/gptq/fast_lora.py and bnb/fast_lora.py.
        """
        ready = run.fused.pop(linear.name, None)
        if ready is not None:
            return ready
        tape, half = run.tape, x.dtype
        if not half.is_half or tape.autocast is not half:
            raise UnsupportedCombinationError(
                "FOAK's fused adapters have a sourced answer here for weights and autocast of the "
                "same half precision, without k-bit preparation (prepare_kbit false)"
            )
        linears = [module for each in self.group if isinstance(module := run.modules[each], Linear)]
        gptq = isinstance(linear.format, GptqTriton)
        source = _GPTQ if gptq else _BNB
        held = [_dequantized(tape.new, each, source) for each in linears if gptq]
        outputs: list[Tensor] = []
        dropped: list[Tensor] = []
        for each in linears:
            if not gptq:
                held.append(_dequantized(tape.new, each, source))
            out = tape.new("output", (*x.shape[:-1], each.fan_out), half, source)
            if not gptq:
                held.clear()
            outputs.append(out)
            dropped.append(self._dropped(x, source))
            low = tape.new("A(x)", (*x.shape[:-1], dim("r", self.r)), half, source)
            update = tape.new("update", out.shape, half, source)
            del low, update
        held.clear()
        inputs: list[Tensor | Param] = [x]
        for each in linears:
            inputs += [run.param(each.name, weight) for weight in self.weights(each)]
        tape.record(
            "fused LoRA", tuple(inputs), (x, *dropped), self._rule(linears, half, source), *outputs
        )
        del dropped
        run.fused.update(zip(self.group[1:], outputs[1:], strict=True))
        return outputs[0]

    def _dropped(self, x: Tensor, source: Cite) -> Tensor:
        if not self.dropout or not x.tape.trains:
            return x
        out = x.tape.new("input after dropout", x.shape, x.dtype, source)
        mask = x.tape.new("dropout mask", x.shape, DType.BOOL, source)
        del mask
        return out

    def _rule(self, linears: list[Linear], half: DType, source: Cite) -> Callable[..., Out]:
        """Return the backward of a group.

        Shapes:
            gradients of A and B  in half precision, until all are made
            gradient of the input [b, s, in]   over bnb's queries, keys and values: the input itself
            dequantized weight    [in, out]    one at a time
            a layer's part        [b, s, in]   while it is added
            mask of the dropout   [b, s, in]   1 byte, with the adapter's part twice, the same
        """
        rank = dim("r", self.r)

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            shape = node.meta_of(0)[0]
            small = [
                node.scratch("gradient of A or B", (width, rank), half, source)
                for each in linears
                for width in (each.fan_in, each.fan_out)
            ]
            into_input: Tensor | None = None
            for each in linears:
                whole = [_dequantized(node.scratch, each, source)]
                if into_input is None:
                    over_input = source is _BNB and len(linears) > 1
                    into_input = (
                        reshaped(saved[0], shape) if over_input else node.new_grad(0, source=source)
                    )
                else:
                    whole.append(node.scratch("a layer's part", shape, half, source))
                whole.clear()
                parts = [node.scratch("where dropout kept", shape, DType.BOOL, source)]
                parts.append(node.scratch("the adapter's part", shape, half, source))
                parts.append(node.scratch("the part that dropout kept", shape, half, source))
                parts.clear()
            into_weights = [
                node.new_grad(number + 1, source=source) for number in range(len(small))
            ]
            small.clear()
            return (into_input, *into_weights)

        return rule


def _dequantized(new: New, linear: Linear, source: Cite) -> Tensor:
    """Return a whole weight; over bnb with its scales unpacked beside it while it is made."""
    shape: tuple[Dim, ...] = (linear.fan_in, linear.fan_out)
    if not isinstance(linear.format, FourBit):
        return new("dequantized weight", shape, DType.FLOAT16, source)
    whole = new("dequantized weight", shape, linear.format.stored, source)
    blocks = dim("n", -(-linear.weight().parameters // BLOCK))
    scales = new("absmax", (blocks,), F32, source)
    del scales
    return whole
