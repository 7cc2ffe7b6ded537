"""Precision: how the weights are stored, and whether autocast runs over them."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.model.spec import Linear, Module
from estimator.run import Run
from estimator.techniques.stage import Stage


class Storage(Struct, frozen=True):
    """One word of the request's `precision`.

    Args:
        master_weights: the optimizer updates fp32 copies.
        main_gradients: gradients are added up in fp32.
        note: what the answer says about it.
    """

    storage: DType
    autocast: DType | None = None
    master_weights: bool = False
    main_gradients: bool = False
    note: str = ""


_TF32: Final = (
    "precision tf32: weights, gradients and activations are fp32 and take the same bytes; only the "
    "multiplication inside matrix products is shorter"
)

PRECISIONS: Final[dict[str, Storage]] = {
    "fp32": Storage(DType.FLOAT32),
    "tf32": Storage(DType.FLOAT32, note=_TF32),
    "bf16": Storage(DType.BFLOAT16),
    "fp16": Storage(DType.FLOAT16),
    "master_bf16": Storage(DType.BFLOAT16, master_weights=True),
    "megatron_bf16": Storage(DType.BFLOAT16, master_weights=True, main_gradients=True),
    "amp_bf16": Storage(DType.FLOAT32, DType.BFLOAT16),
    "amp_fp16": Storage(DType.FLOAT32, DType.FLOAT16),
}
AUTOCAST: Final[dict[str, DType]] = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16}


class Precision(Struct, frozen=True):
    """Store every weight in one type; keep fp32 master copies where the word says so.

    tf32 is a switch of the products alone.

    Source: torch-backends, cuda/__init__.py, cuBLASModule.
    """

    stage: ClassVar[Stage] = Stage.STORE
    name: str
    autocast: str | None

    def apply(self, run: Run) -> Run:
        """Set the type of every module that is not quantized."""
        regime = PRECISIONS[self.name]
        autocast = AUTOCAST[self.autocast] if self.autocast is not None else regime.autocast

        def store(module: Module) -> Module:
            if isinstance(module, Linear) and module.format is not None:
                return module
            return replace(module, dtype=regime.storage)

        optimizer = replace(
            run.optimizer,
            master_weights=regime.master_weights or run.optimizer.of_blocks,
            main_gradients=regime.main_gradients,
        )
        spec = run.spec.map_modules(store)
        if regime.note:
            spec = replace(spec, notes=(*spec.notes, regime.note))
        return replace(run, spec=spec, autocast=autocast, optimizer=optimizer)
