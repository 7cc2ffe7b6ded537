"""4-bit weights as bitsandbytes stores and multiplies them."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Tensor
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Module, Weight
from estimator.run import Run
from estimator.section import Kind
from estimator.sources import Cite
from estimator.techniques.stage import Stage

COMPUTE: Final = {each.label: each for each in DType}
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
    """

    double_quant: bool
    stored: DType
    compute: DType

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the packed weight and its quantization state.

        Shapes:
            packed               [in·out / 2]         1 byte
            absmax               [in·out / 64]        4 bytes, or 1 byte with double quantization
            absmax of absmax     [in·out / 64 / 256]  4 bytes
            code, code of absmax [16], [256]          4 bytes
            offset               [1]                  4 bytes

        Source: dettmers2023, section 3; bitsandbytes, functional.py, quantize_4bit.
        """
        count = linear.weight().parameters
        blocks = -(-count // BLOCK)
        packed = Weight("weight", _flat(-(-count // 2)), DType.UINT8, False, count, _STATE)
        code = _part("weight.code", 16, DType.FLOAT32)
        if not self.double_quant:
            return packed, _part("weight.absmax", blocks, DType.FLOAT32), code
        return (
            packed,
            _part("weight.absmax", blocks, DType.UINT8),
            _part("weight.nested_absmax", -(-blocks // ABSMAX_BLOCK), DType.FLOAT32),
            _part("weight.nested_code", 256, DType.FLOAT32),
            _part("weight.offset", 1, DType.FLOAT32),
            code,
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Multiply in the compute type, return the input's type, save only the packed weight.

        Backward dequantizes the whole weight for each product, forward does so for more tokens
        than its fused kernel takes.

        Source: bitsandbytes, nn/modules.py, Linear4bit.forward; backends/cuda/ops.py,
        _gemm_4bit_custom_max_m.
        """
        given = ops.cast(x, self.compute, "input in the compute type")
        held = self._dequantized(run, linear) if run.tape.regime.dequantizes else []
        shape = (*x.shape[:-1], linear.fan_out)
        out = run.tape.new("output", shape, self.compute, _MATMUL)
        held.clear()
        scratch = tuple((each.shape, each.dtype) for each in self._temporaries(linear))

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = [node.scratch("dequantized weight", *each, _MATMUL) for each in scratch]
            grad = node.new_grad(0, source=_MATMUL)
            whole.clear()
            return (grad,)

        run.tape.record("matmul_4bit", (given,), (), rule, out)
        return ops.cast(out, x.dtype, "output in the input's type")

    def _temporaries(self, linear: Linear) -> tuple[Weight, ...]:
        """Return what dequantizing allocates: the scales where they are nested, and the weight.

        Source: bitsandbytes, functional.py, dequantize_4bit.
        """
        blocks = _flat(-(-linear.weight().parameters // BLOCK))
        whole = replace(linear.weight(), dtype=self.stored)
        scales = (Weight("absmax", blocks, DType.FLOAT32, False),) if self.double_quant else ()
        return (*scales, whole)

    def _dequantized(self, run: Forward, linear: Linear) -> list[Tensor]:
        return [
            run.tape.new("dequantized weight", each.shape, each.dtype, _MATMUL)
            for each in self._temporaries(linear)
        ]


def _flat(count: int) -> tuple[Dim]:
    return (dim("n", count),)


def _part(name: str, count: int, dtype: DType) -> Weight:
    return Weight(name, _flat(count), dtype, False, 0, _STATE)


class Quantization(Kind, frozen=True):
    """How the frozen base weights are stored; applies after they have got their types."""

    stage: ClassVar[Stage] = Stage.STORE
    source: ClassVar[Cite]

    def apply(self, run: Run) -> Run:
        """Return the run with packed linear layers."""
        raise NotImplementedError


class FourBitQuantization(Quantization, frozen=True):
    """Store every linear layer but the head in 4 bits; optionally raise the rest to fp32."""

    source: ClassVar[Cite] = Cite("dettmers2023", "section 3")

    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    prepare_kbit: bool = True

    def apply(self, run: Run) -> Run:
        """Return the run with packed linear layers.

        transformers replaces plain `nn.Linear` only, so a class of the model's own (Falcon's) stays
        as it is (hf-library, integrations/bitsandbytes.py, replace_with_bnb_linear).

        `prepare_model_for_kbit_training` casts norms, embeddings and head to fp32.

        Source: peft, utils/other.py, prepare_model_for_kbit_training.
        """
        stored = run.spec.embeddings[0].dtype
        compute = COMPUTE[self.compute_dtype]
        head = run.spec.head.name
        packed = FourBit(self.double_quant, stored, compute)
        rest = DType.FLOAT32 if self.prepare_kbit else stored

        def quantize(module: Module) -> Module:
            if isinstance(module, Linear) and module.name != head and not module.spelled_out:
                return replace(module, format=packed, dtype=rest)
            return replace(module, dtype=rest)

        spec = run.spec.map_modules(quantize)
        if not any(isinstance(each, Linear) and each.format for each, _ in spec.module_counts()):
            note = (
                f"transformers packs plain nn.Linear only; the layers of {spec.model_type} are of "
                "a class of their own and keep their full width"
            )
            spec = replace(spec, notes=(*spec.notes, note))
        return replace(run, spec=spec)


class Nf4(FourBitQuantization, frozen=True, tag="nf4"):
    """4-bit NormalFloat (bitsandbytes)."""


class Fp4(FourBitQuantization, frozen=True, tag="fp4"):
    """4-bit floats (bitsandbytes)."""
