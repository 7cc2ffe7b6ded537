"""Kernels that replace parts of the model's layers."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.run import Run
from estimator.techniques.stage import Stage, Technique


class Liger(Struct, frozen=True):
    """Liger's RMSNorm, rotary positions and SwiGLU or GeGLU; its loss is another field."""

    stage: ClassVar[Stage] = Stage.KERNEL

    def apply(self, run: Run) -> Run:
        """Let every layer run them.

        Raises:
            UnsupportedCombinationError: Liger does not patch this model, or not as read here.
        """
        spec = run.spec
        if spec.model_type not in MODEL_TYPES or not run.loss.startswith("transformers"):
            raise UnsupportedCombinationError(
                f"kernels 'liger' have no sourced answer for {spec.model_type} models here; they "
                f"have one for {', '.join(sorted(MODEL_TYPES))}"
            )
        for kind in spec.kinds:
            activation = kind.facts["activation"]
            if activation not in ACTIVATIONS:
                raise UnsupportedCombinationError(
                    f"Liger has no kernel for an MLP with the activation {activation!r}"
                )
        return replace(run, settings=replace(run.settings, liger=True))


class Foak(Struct, frozen=True):
    """fms-acceleration's kernels (FOAK): RMSNorm, rotary positions, the loss."""

    stage: ClassVar[Stage] = Stage.KERNEL

    def apply(self, run: Run) -> Run:
        """Let norms, rotary positions and the loss run them.

        Raises:
            UnsupportedCombinationError: another model, another transformers, or quantized weights,
                over which FOAK fuses the adapters too.

        Source: fms-foak, models/mistral.py, get_mp_rules; framework_plugin_fast_kernels.py.
        """
        spec = run.spec
        packed = any(
            isinstance(each, Linear) and each.format is not None for each, _ in spec.module_counts()
        )
        if spec.model_type not in ("llama", "mistral") or run.loss != "transformers-4" or packed:
            raise UnsupportedCombinationError(
                "kernels 'foak' have a sourced answer here for llama and mistral models whose "
                "weights are not quantized, with software transformers 4 and loss 'standard'"
            )
        return replace(run, loss="foak", settings=replace(run.settings, foak=True))


# monkey_patch.py of Liger, apply_liger_kernel_to_*.
MODEL_TYPES: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
)
ACTIVATIONS: Final = frozenset({"silu", "swish", "gelu_pytorch_tanh"})

KERNELS: Final[dict[str, Technique]] = {"liger": Liger(), "foak": Foak()}
