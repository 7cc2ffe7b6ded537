"""The optimizer of a request: one row for each name, built as the Trainer builds it."""

from __future__ import annotations

from typing import Any

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import EstimateRequest


def build(model: Any, request: EstimateRequest) -> Any:
    """Return the optimizer over the trainable parameters, in the Trainer's two groups.

    Raises:
        InvalidRequestError: the optimizer, or the implementation of it, is not known.
    """
    import torch

    name, implementation = request.optimizer.name, request.optimizer.implementation
    groups = parameter_groups(model)
    flags = {"foreach": implementation == "foreach", "fused": implementation in ("fused", None)}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=1e-5, **flags)
    if name == "adam":
        return torch.optim.Adam(groups, lr=1e-5, **flags)
    raise InvalidRequestError(f"unknown optimizer {name!r}")


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Return the parameters with and without weight decay, as `Trainer.create_optimizer` does."""
    from transformers.trainer_pt_utils import get_parameter_names
    import torch

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trainable if n in decayed], "weight_decay": 0.0},
        {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
    ]
