"""Kernels that replace parts of the model's layers."""

from __future__ import annotations

from typing import ClassVar, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.run import Run
from estimator.techniques.stage import Stage


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


# monkey_patch.py of Liger, apply_liger_kernel_to_*.
MODEL_TYPES: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}
)
ACTIVATIONS: Final = frozenset({"silu", "swish", "gelu_pytorch_tanh"})

KERNELS: Final = {"liger": Liger()}
