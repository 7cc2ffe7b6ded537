"""How a real model computes its loss: its own head and loss, or a function that takes both.

The functions are those of the libraries themselves; for fake tensors their kernels do not run. Each
replaces `forward` of the model on the meta device, as the library's own patch does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final
from unittest import mock

from estimator.errors import UnsupportedCombinationError
from estimator.request import EstimateRequest
from profiler import trace, unsloth
from profiler.without_kernels import Installed, Library, OnCuda, library

PhaseCallback = Callable[[str], None]


@dataclass(frozen=True)
class ModelsOwn:
    """Logits and `loss_function`, as transformers' model classes write them."""

    fake: bool = True

    def fit(self, model: Any) -> None:
        """Leave the model as it is."""

    @contextlib.contextmanager
    def running(
        self, model: Any, phase: PhaseCallback, compute_capability: tuple[int, int]
    ) -> Iterator[None]:
        """Announce the moment at which the model's own loss function begins."""
        base = _base(model)
        loss_function = base.loss_function
        if model._compiled_call_impl is not None:
            # The loss is a part of the compiled graphs; nothing may break them.
            yield
            return

        def announced(*args: Any, **kwargs: Any) -> Any:
            phase(trace.LOSS_FORWARD)
            return loss_function(*args, **kwargs)

        base.loss_function = announced
        try:
            yield
        finally:
            base.loss_function = loss_function


@dataclass(frozen=True)
class FusedLinear:
    """Liger's loss, as `use_liger_kernel` puts it into the model and without its other kernels.

    Source: liger_kernel/transformers/monkey_patch.py, `_apply_liger_kernel_to_instance`.
    """

    fake: bool = True

    @property
    def library(self) -> Library | Installed:
        """Liger; for fake tensors, without its kernels."""
        return library("liger_kernel", "transformers.monkey_patch", fake=self.fake)

    def fit(self, model: Any) -> None:
        """Replace the model's forward by the one that hands hidden states to the loss.

        Raises:
            UnsupportedCombinationError: Liger has no such forward for this model.
        """
        with self.library.present():
            patches = self.library["transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN
            patch = patches.get(model.config.model_type)
            if patch is None:
                raise UnsupportedCombinationError(
                    f"Liger has no fused linear loss for {model.config.model_type} models"
                )
            kernels = [name for name in _LIGER_KERNELS if name in _parameters(patch)]
            patch(model=model, fused_linear_cross_entropy=True, **dict.fromkeys(kernels, False))

    @contextlib.contextmanager
    def running(
        self, model: Any, phase: PhaseCallback, compute_capability: tuple[int, int]
    ) -> Iterator[None]:
        """Announce the loss, and let its code believe that it runs on a GPU, if it does not."""
        found = self.library
        ops = found["ops.fused_linear_cross_entropy"]
        with contextlib.ExitStack() as patches:
            patches.enter_context(found.present())
            for module in found.holding("LigerForCausalLMLoss"):
                _wrap(patches, module, "LigerForCausalLMLoss", before=phase)
            for name in ("forward", "backward") if self.fake else ():
                name = f"fused_linear_cross_entropy_{name}"
                _wrap(patches, ops, name, inside=lambda: OnCuda("liger_kernel", compute_capability))
            yield


@dataclass(frozen=True)
class CutCrossEntropy:
    """Apple's loss on hidden states, as its patch of transformers' models calls it.

    Source: ml-cross-entropy, transformers/llama.py and transformers/utils.py, apply_lce.
    """

    fake: bool = True

    @property
    def library(self) -> Library | Installed:
        """The package; for fake tensors, without its kernels."""
        return library("cut_cross_entropy", "linear_cross_entropy", fake=self.fake)

    def fit(self, model: Any) -> None:
        """Replace the model's forward by one that hands hidden states to the loss."""
        softcap = getattr(model.config, "final_logit_softcapping", None)
        function = self.library["linear_cross_entropy"]

        def forward(self: Any, labels: Any, **inputs: Any) -> Any:
            hidden_states = getattr(self, self.base_model_prefix)(**inputs)[0]
            weight = self.get_output_embeddings().weight
            if hidden_states.dtype.itemsize != _HALF:
                raise UnsupportedCombinationError(
                    "the backward of cut_cross_entropy takes bf16 and fp16 hidden states only"
                )
            loss = function.linear_cross_entropy(
                hidden_states, weight, labels, softcap=softcap, shift=True
            )
            return {"loss": loss}

        model.forward = MethodType(forward, model)

    @contextlib.contextmanager
    def running(
        self, model: Any, phase: PhaseCallback, compute_capability: tuple[int, int]
    ) -> Iterator[None]:
        """Announce the loss."""
        found = self.library
        with contextlib.ExitStack() as patches:
            patches.enter_context(found.present())
            _wrap(patches, found["linear_cross_entropy"], "linear_cross_entropy", before=phase)
            yield


@dataclass(frozen=True)
class Chunked:
    """The head that TRL's SFTTrainer gives the model, and the loss that it makes of it.

    Source: trl/trainer/sft_trainer.py, `SFTTrainer.__init__` and `compute_loss`.
    """

    fake: bool = True

    @property
    def library(self) -> Library | Installed:
        """TRL; for fake tensors, without its kernels."""
        return library("trl", "trainer.utils", "kernels.chunked_logprob", fake=self.fake)

    def fit(self, model: Any) -> None:
        """Let the model return log-probabilities in place of logits, and reduce them."""
        with self.library.present():
            self.library["trainer.utils"].add_fused_lm_head(
                model, outputs=("log_probs", "entropy", "is_top1")
            )
        fused = model.forward

        def forward(self: Any, **inputs: Any) -> Any:
            outputs = fused(fused_lm_head=True, **inputs)
            per_token_loss = -outputs.log_probs
            return {"loss": per_token_loss.sum() / outputs.label_mask.sum().clamp(min=1)}

        model.forward = MethodType(forward, model)

    @contextlib.contextmanager
    def running(
        self, model: Any, phase: PhaseCallback, compute_capability: tuple[int, int]
    ) -> Iterator[None]:
        """Announce the loss, and let TRL take what it takes on a GPU, where there is none."""
        import torch

        found = self.library
        head, kernel = found["trainer.utils"], found["kernels.chunked_logprob"]

        def announce(name: str) -> None:
            # The backward pass gathers the head as well.
            if torch.is_grad_enabled():
                phase(name)

        def on_a_gpu(*_: Any) -> bool:
            return True

        def in_place(*_: Any) -> None:
            """`_addmm_fp32` on a GPU: cuBLAS adds to the accumulator."""

        with contextlib.ExitStack() as patches:
            patches.enter_context(found.present())
            _wrap(patches, head, "maybe_gather_lm_head_ctx", before=announce)
            if self.fake:
                for module in (head, kernel):
                    patches.enter_context(mock.patch.object(module, "_use_triton", on_a_gpu))
                patches.enter_context(mock.patch.object(kernel, "_addmm_fp32", in_place))
            yield


LOSSES: Final[dict[str, Any]] = {
    "standard": ModelsOwn,
    "fused_linear": FusedLinear,
    "cut_cross_entropy": CutCrossEntropy,
    "chunked": Chunked,
}

# Bytes of a number of half precision.
_HALF: Final = 2

# What `apply_liger_kernel_to_*` patches beside the loss.
_LIGER_KERNELS: Final = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm", "cross_entropy")


def of(request: EstimateRequest, *, fake: bool) -> Any:
    """Return how the model of a request computes its loss.

    Args:
        request: one single-GPU run.
        fake: whether the tensors have no values, so that kernels are not launched.
    """
    return unsloth.UnslothLoss() if unsloth.wanted(request) else LOSSES[request.loss](fake)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(function: Callable[..., Any]) -> Any:
    import inspect

    return inspect.signature(function).parameters


def _wrap(
    patches: contextlib.ExitStack,
    module: Any,
    name: str,
    *,
    before: PhaseCallback | None = None,
    inside: Callable[[], Any] = contextlib.nullcontext,
) -> None:
    """Announce a function where it begins, and run it inside a context, until the stack closes."""
    function = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(trace.LOSS_FORWARD)
        with inside():
            return function(*args, **kwargs)

    patches.enter_context(mock.patch.object(module, name, wrapped))
