"""How torchtune fits a model to its method: NF4 tensors of torchao, and tables for each layer."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Node, Tape, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Module, Weight, Wrapper
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.quantizations.four_bit import FourBit

BLOCK: Final = 64
SCALER_BLOCK: Final = 256
_STATE: Final = Cite("torchao-nf4", "NF4Tensor.from_tensor")
_WEIGHT: Final = Cite("torchao-nf4", "NF4Tensor.get_original_weight")


class Nf4Tensor(Struct, frozen=True):
    """A weight as torchao's NF4Tensor holds it; products are made with the whole weight.

    Args:
        stored: the type that the weight had, and has again when dequantized.
    """

    wrapper: ClassVar[Wrapper] = Wrapper()

    stored: DType

    @property
    def adapter_dtype(self) -> DType | None:
        """The type that the tensor claims to have."""
        return self.stored

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the packed weight and what scales it.

        Shapes:
            quantized_data       [in·out / 2]         1 byte
            quantized_scalers    [in·out / 64]        1 byte
            quantization_factor  [in·out / 64 / 256]  width of the weight
            scaler_mean, nf4     [1], [16]            width of the weight

        Source: torchao-nf4, NF4Tensor.from_tensor.
        """
        count = linear.weight().parameters
        blocks = count // BLOCK
        return (
            Weight("quantized_data", _flat(count // 2), DType.UINT8, False, count, _STATE),
            _part("quantized_scalers", blocks, DType.INT8),
            _part("quantization_factor", blocks // SCALER_BLOCK, self.stored),
            _part("scaler_mean", 1, self.stored),
            _part("nf4", 16, self.stored),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Multiply by the dequantized weight, in backward too.

        The packed weight is saved, so that a recomputation runs up to here.

        Source: torchao-nf4, LinearNF4.
        """
        tape, count = run.tape, linear.weight().parameters
        whole = _dequantized(tape, count, self.stored, None)
        out = tape.new("output", (*x.shape[:-1], linear.fan_out), x.dtype, _WEIGHT)
        whole.clear()

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor | None]:
            whole = _dequantized(node.tape, count, self.stored, node)
            grad = node.new_grad(0, source=_WEIGHT)
            whole.clear()
            return (grad,)

        packed = Tensor(tape, (), self.stored, None)
        tape.record("linear_nf4", (x,), (packed,), rule, out)
        return out


def _dequantized(tape: Tape, count: int, dtype: DType, node: Node | None) -> list[Tensor]:
    """Return the whole weight; every name inside lives until it is there.

    Shapes:
        indices, of the upper and the lower 4 bits  [in·out / 2]  8 bytes each
        values, of each                             [in·out / 2]  width of the weight each
        scaled values, of each                      [in·out / 2]  width of the weight each
        weight                                      [out, in]     width of the weight

    Source: torchao-nf4, NF4Tensor.get_original_weight.
    """

    def new(name: str, elements: int, kind: DType) -> Tensor:
        if node is not None:
            return node.scratch(name, _flat(elements), kind, _WEIGHT)
        return tape.new(name, _flat(elements), kind, _WEIGHT)

    half = count // 2
    held = [new("indices", half, DType.INT64) for _ in range(2)]
    held += [new("values", half, dtype) for _ in range(2)]
    held.append(new("scalers", count // BLOCK, dtype))
    held += [new("scaled values", half, dtype) for _ in range(2)]
    whole = [new("dequantized weight", count, dtype)]
    held.clear()
    return whole


def _flat(count: int) -> tuple[Dim]:
    return (dim("n", count),)


def _part(name: str, count: int, dtype: DType) -> Weight:
    return Weight(name, _flat(count), dtype, False, 0, _STATE)


def fitted(run: Run) -> Run:
    """Return the run as the builders of torchtune 0.6 make its model.

    A full model has one set of rotary tables; with adapters every layer makes its own, but for
    Llama 3.1 and later.

    Source: torchtune, models/llama2/_component_builders.py, llama2 and lora_llama2_self_attention;
    models/llama3_1/_component_builders.py, lora_llama3_1.
    """
    adapted = any(_is_adapted(each) for each, _ in run.spec.module_counts())
    if not adapted or run.spec.scaled_positions:
        run = replace(run, spec=replace(run.spec, buffers=run.spec.buffers[:2]))
    return _packed(run, every_linear=True)


def fitted_middle(run: Run) -> Run:
    """Return the run as the builders of torchtune 0.3 make its model.

    Layers are copies of one, and so have their own rotary tables.

    Source: torchtune-0-3, torchtune/models/llama2/_component_builders.py, lora_llama2.
    """
    return _packed(run, every_linear=True)


def fitted_early(run: Run) -> Run:
    """Return the run as the builders of torchtune 0.1 make its model.

    Only layers with an adapter are quantized, and no adapter is told of the dropout.

    Source: torchtune-0-1, torchtune/models/llama2/_component_builders.py, lora_llama2.
    """

    def without_dropout(module: Module) -> Module:
        if not isinstance(module, Linear) or not isinstance(module.adapter, LoraAdapter):
            return module
        return replace(module, adapter=replace(module.adapter, dropout=0.0))

    run = replace(run, spec=run.spec.map_modules(without_dropout))
    return _packed(run, every_linear=False)


def _is_adapted(module: Module) -> bool:
    return isinstance(module, Linear) and module.adapter is not None


def _packed(run: Run, *, every_linear: bool) -> Run:
    """Put torchao's format where the request asks for 4 bits.

    Raises:
        UnsupportedCombinationError: another format than NF4 with its scales quantized.
    """
    formats = run.spec.formats()
    if not formats:
        return run
    asked = formats[0]
    if not isinstance(asked, FourBit) or not asked.double_quant:
        raise UnsupportedCombinationError(
            "torchtune quantizes to nf4 with double_quant only; use that, or software "
            "'transformers'"
        )
    stored = run.spec.embeddings[0].dtype

    def convert(module: Module) -> Module:
        if not isinstance(module, Linear) or module.format is None:
            return module
        packs = every_linear or module.adapter is not None
        return replace(module, format=Nf4Tensor(stored) if packs else None, dtype=stored)

    return replace(run, spec=run.spec.map_modules(convert))
