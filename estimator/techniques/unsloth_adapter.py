"""LoRA as Unsloth fuses it: one function for queries, keys and values, one for a whole MLP."""

from __future__ import annotations

from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager.ops import Grads, Out
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Param, Tensor, reshaped
from estimator.model.forward import Forward
from estimator.model.spec import Linear
from estimator.sources import Cite
from estimator.techniques.lora_adapter import LoraAdapter

ATTENTION: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT: Final = ("self_attn.o_proj",)
MLP: Final = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QKV: Final = Cite("unsloth", "kernels/fast_lora.py, LoRA_QKV and LoRA_W")
_MLP: Final = Cite("unsloth", "kernels/fast_lora.py, LoRA_MLP; kernels/swiglu.py")
_PRODUCT: Final = Cite("unsloth", "kernels/utils.py, matmul_lora")
_WHOLE: Final = Cite("unsloth", "kernels/utils.py, fast_dequantize, without use_global_buffer")


class _Group(LoraAdapter, frozen=True, kw_only=True):
    """An adapter that is computed together with others.

    Args:
        group: the layers that the first call computes.
    """

    group: tuple[str, ...]

    def _linears(self, run: Forward) -> list[Linear]:
        return [each for name in self.group if isinstance(each := run.modules[name], Linear)]

    def _inputs(self, run: Forward, linears: list[Linear], x: Tensor) -> tuple[Any, ...]:
        """Return what gradients are made for: x, then A and B of each layer."""
        inputs: list[Tensor | Param] = [x]
        for each in linears:
            inputs += [run.param(each.name, weight) for weight in self.weights(each)]
        return tuple(inputs)

    def _product(self, linear: Linear, x: Tensor) -> Tensor:
        """Return base and update of one layer; the update is added by the product itself.

        Shapes:
            output  [b, s, out]
            A(x)    [b, s, r]
            A, B    [in, r], [r, out]  in half precision, for a moment each

        Source: unsloth, kernels/utils.py, matmul_lora.
        """
        tape, half, rank = x.tape, x.dtype, dim("r", self.r)
        out = tape.new("output", (*x.shape[:-1], linear.fan_out), half, _PRODUCT)
        matrix = tape.new("A in half", (linear.fan_in, rank), half, _PRODUCT)
        low = tape.new("A(x)", (*x.shape[:-1], rank), half, _PRODUCT)
        del matrix
        matrix = tape.new("B in half", (rank, linear.fan_out), half, _PRODUCT)
        del matrix, low
        return out

    def _small(self, node: Node, linears: list[Linear], half: DType, name: str) -> list[Tensor]:
        """Return a tensor like A and one like B for each layer."""
        rank = dim("r", self.r)
        return [
            node.scratch(name, (width, rank), half, _QKV)
            for each in linears
            for width in (each.fan_in, each.fan_out)
        ]


class FusedLora(_Group, frozen=True, kw_only=True):
    """The adapter of a layer of attention."""

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return this layer's output; the first call of a group makes those of all.

        Source: unsloth, kernels/fast_lora.py, LoRA_QKV.forward and LoRA_W.forward.
        """
        ready = run.fused.pop(linear.name, None)
        if ready is not None:
            return ready
        linears = self._linears(run)
        outputs = [self._product(each, x) for each in linears]

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            return self._backward(node, linears, saved)

        run.tape.record("fused LoRA", self._inputs(run, linears, x), (x,), rule, *outputs)
        run.fused.update(zip(self.group[1:], outputs[1:], strict=True))
        return outputs[0]

    def _backward(self, node: Node, linears: list[Linear], saved: list[Any]) -> Out:
        """Return the gradients of a group.

        Shapes:
            A, B                  in half precision, of all layers
            gradients of A and B  in half precision, until all are made
            dY B                  [b, s, r]    of each layer
            gradient of the input [b, s, in]   over the input itself, but for the output layer
            dequantized weight    [in, out]    one at a time

        Source: unsloth, kernels/fast_lora.py, LoRA_QKV.backward and LoRA_W.backward.
        """
        shape, half = node.meta_of(0)
        rank = dim("r", self.r)
        beside = self._small(node, linears, half, "A or B in half")
        small = self._small(node, linears, half, "gradient of A or B")
        beside += [node.scratch("dY B", (*shape[:-1], rank), half, _QKV) for _ in linears]
        for _ in linears:
            node.scratch("A(x)", (*shape[:-1], rank), half, _QKV)
        into: Tensor | None = None
        for each in linears:
            whole = _dequantized(node, each, half)
            if into is None:
                over = len(linears) > 1
                into = reshaped(saved[0], shape) if over else node.new_grad(0, source=_QKV)
            del whole
        beside.clear()
        return (into, *_in_full(node, small))


class FusedMlp(_Group, frozen=True, kw_only=True):
    """The adapters of a gated MLP: that of the gate runs all three layers and the activation."""

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return the output of the MLP.

        Shapes:
            gate, up  [b, s, f]  saved, beside x
            product   [b, s, f]  dies with the output

        Source: unsloth, kernels/fast_lora.py, LoRA_MLP.forward.
        """
        linears = self._linears(run)
        gate, up = (self._product(each, x) for each in linears[:2])
        product = run.tape.new("gated product", gate.shape, x.dtype, _MLP)
        out = self._product(linears[2], product)
        del product

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            return self._backward(node, linears, saved)

        run.tape.record("fused MLP", self._inputs(run, linears, x), (x, gate, up), rule, out)
        return out

    def _backward(self, node: Node, linears: list[Linear], saved: list[Any]) -> Out:
        """Return the gradients of an MLP; gate and up are written over, and the input too.

        Shapes:
            gradient of the product [b, s, f]
            A, B                    in half precision, of all layers
            gradients of A and B    in half precision, until all are made
            dY B                    [b, s, r]   of gate and up; of down for a moment
            dequantized weight      [h, f]      of up, then of gate; of down in the buffer

        Source: unsloth, kernels/fast_lora.py, LoRA_MLP.backward; kernels/swiglu.py,
        swiglu_DWf_DW_dfg_kernel.
        """
        shape, half = node.meta_of(0)
        low = (*shape[:-1], dim("r", self.r))
        beside = self._small(node, linears, half, "A or B in half")
        width: Dim = linears[2].fan_in
        beside.append(node.scratch("gradient of the product", (*shape[:-1], width), half, _MLP))
        node.scratch("dY B", low, half, _MLP)
        small = self._small(node, linears, half, "gradient of A or B")
        for _ in range(2):
            node.scratch("dY B or A(x)", low, half, _MLP)
        beside += [node.scratch("dY B", low, half, _MLP) for _ in range(2)]
        for _ in range(2):
            node.scratch("A(x)", low, half, _MLP)
        for each in linears[:2]:
            _dequantized(node, each, half)
        into = reshaped(saved[0], shape)
        beside.clear()
        return (into, *_in_full(node, small))


def _in_full(node: Node, small: list[Tensor]) -> list[Tensor]:
    """Cast gradients to the fp32 of their weights, as autograd does when a function returns."""
    out = []
    for number in range(1, len(small) + 1):
        out.append(node.new_grad(number, source=_QKV))
        small.pop(0)
    return out


def _dequantized(node: Node, linear: Linear, half: DType) -> Tensor | None:
    """Return a whole weight where it is packed; its scales are read inside the kernel."""
    if linear.format is None:
        return None
    return node.scratch("dequantized weight", (linear.fan_in, linear.fan_out), half, _WHOLE)
