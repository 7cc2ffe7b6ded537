"""How Lit-GPT stores 4-bit weights: bitsandbytes 0.41, and every linear layer, the head too."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager.tensor import Node, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Module
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.quantizations.four_bit import FourBit

_MATMUL = Cite("bitsandbytes-2023", "autograd/_functions.py, MatMul4Bit")


class OldFourBit(FourBit, frozen=True):
    """The 4-bit product of bitsandbytes 0.41: it keeps its input for nothing.

    Lightning quantizes from fp16, so the weight comes back as fp16 and is cast to the input's type.
    """

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Multiply by the dequantized weight.

        Shapes:
            weight  [out, in]  2 bytes, twice, in forward and in backward
            input   [b, s, in]  width of the run, saved

        Source: bitsandbytes-2023, autograd/_functions.py, MatMul4Bit; lightning,
        fabric/plugins/precision/bitsandbytes.py, _Linear4bit._quantize_weight.
        """
        weight, dtype = linear.weight().shape, x.dtype
        held = [
            run.tape.new("dequantized weight", weight, each, _MATMUL)
            for each in (DType.FLOAT16, dtype)
        ]
        out = run.tape.new("output", (*x.shape[:-1], linear.fan_out), dtype, _MATMUL)
        held.clear()

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = [
                node.scratch("dequantized weight", weight, each, _MATMUL)
                for each in (DType.FLOAT16, dtype)
            ]
            grad = node.new_grad(0, source=_MATMUL)
            whole.clear()
            return (grad,)

        run.tape.record("matmul_4bit", (x,), (x,), rule, out)
        return out


def litgpt_formats(run: Run) -> Run:
    """Return the run with litgpt's 4-bit layers where the request asks for 4 bits.

    Raises:
        UnsupportedCombinationError: another format than 4 bits.

    Source: lightning, fabric/plugins/precision/bitsandbytes.py, _convert_layers.
    """
    formats = run.spec.formats()
    if not formats:
        return run
    packed = formats[0]
    if not isinstance(packed, FourBit):
        raise UnsupportedCombinationError(
            "litgpt with a quantization other than nf4 or fp4 has no source here yet"
        )
    old = OldFourBit(packed.double_quant, packed.stored, packed.compute)

    def convert(module: Module) -> Module:
        return replace(module, format=old) if isinstance(module, Linear) else module

    return replace(run, spec=run.spec.map_modules(convert))
