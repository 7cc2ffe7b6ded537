"""What TRL's SFTTrainer computed of the logits before it had a head of its own.

The operators are those of `SFTTrainer.compute_loss` and `entropy_from_logits` at the tags v0.27.0
and v1.3.0, in their order and with the same names bound; the versions are not installed here.
"""

from __future__ import annotations

from typing import Any, Final

_ROWS: Final = 128


def measure(logits: Any, labels: Any, version: str) -> None:
    """Compute entropy and token accuracy, and drop them.

    Args:
        logits: of the model's outputs.
        labels: of the batch, not shifted.
        version: TRL's, as the request names it.
    """
    import torch

    with torch.no_grad():
        if version == "1.3":
            shifted = logits[..., :-1, :].contiguous()
            _entropy(shifted)
        else:
            _entropy(logits)
        shifted = logits[..., :-1, :].contiguous()
        expected = labels[..., 1:].contiguous()
        ((shifted.argmax(dim=-1) == expected) & (expected != -100)).sum()


def _entropy(logits: Any) -> Any:
    import torch

    shape = logits.shape[:-1]
    rows = logits.reshape(-1, logits.shape[-1])
    entropies = []
    for chunk in rows.split(_ROWS, dim=0):
        log_probs = torch.nn.functional.log_softmax(chunk, dim=-1)
        entropies.append(-(torch.exp(log_probs) * log_probs).sum(-1))
    return torch.cat(entropies).reshape(shape)
