"""The standard loss of causal language models, as each version of transformers writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from estimator.eager import ops
from estimator.eager.size import BATCH, SEQ, Dim
from estimator.eager.tensor import Tensor, view

Loss = Callable[[Tensor, Tensor, Dim], Tensor]


def transformers_5(logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
    """Cross entropy in fp32 over all positions; the labels are shifted, the logits are not.

    Shapes:
        logits          [b, s, V]  width of the model
        fp32 copy       [b, s, V]  4 bytes, alive until the function returns
        log-softmax     [b, s, V]  4 bytes, saved

    Source: hf-loss, ForCausalLMLoss and fixed_cross_entropy.
    """
    logits = ops.cast(logits, ops.F32, "logits in fp32")
    flat = view(logits, (BATCH, SEQ, vocab))
    return ops.nll_loss(ops.log_softmax(flat), labels)


def transformers_4(logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
    """Cross entropy of transformers before 4.50: the logits themselves are shifted and copied.

    Source: transformers v4.44.0, models/llama/modeling_llama.py, LlamaForCausalLM.forward:
    `logits.float()`, then `logits[..., :-1, :].contiguous()`.
    """
    logits = ops.cast(logits, ops.F32, "logits in fp32")
    shifted = ops.copy(ops.narrow(logits, vocab), name="shifted logits")
    return ops.nll_loss(ops.log_softmax(shifted), labels)


LOSSES: Final[dict[str, Loss]] = {
    "transformers-5": transformers_5,
    "transformers-4": transformers_4,
}
