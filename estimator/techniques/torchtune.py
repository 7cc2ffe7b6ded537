"""How torchtune fits a model to its method: NF4 tensors of torchao, and tables for each layer."""

from __future__ import annotations

from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear, Module
from estimator.run import Run
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.quantizations.four_bit import FourBit
from estimator.techniques.torchao_nf4 import Nf4Tensor, WholeNf4Tensor


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
    return _packed(run, every_linear=False, packed=WholeNf4Tensor)


def _is_adapted(module: Module) -> bool:
    return isinstance(module, Linear) and module.adapter is not None


def _packed(run: Run, *, every_linear: bool, packed: type[Nf4Tensor] = Nf4Tensor) -> Run:
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
        return replace(module, format=packed(stored) if packs else None, dtype=stored)

    return replace(run, spec=run.spec.map_modules(convert))
