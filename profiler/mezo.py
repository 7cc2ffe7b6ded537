"""One step of MeZO, as its Trainer runs it.

Source: princeton-nlp/MeZO, large_models/trainer.py: zo_step, zo_forward, zo_perturb_parameters and
zo_update, without a torch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from profiler import trace

EPSILON: Final = 1e-3
LEARNING_RATE: Final = 1e-6
WEIGHT_DECAY: Final = 0.0
# The value is in no tensor: fake ones have none.
PROJECTED_GRADIENT: Final = 0.5


def step(model: Any, inputs: dict[str, Any], phase: Callable[[str], None]) -> None:
    """Perturb, evaluate, perturb back, evaluate, reset, update."""
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    phase(trace.OPTIMIZER_STEP)
    _perturb(named, 1.0)
    first = _evaluate(model, inputs, phase)
    phase(trace.OPTIMIZER_STEP)
    _perturb(named, -2.0)
    second = _evaluate(model, inputs, phase)
    phase(trace.OPTIMIZER_STEP)
    (first - second) / (2 * EPSILON)
    _perturb(named, 1.0)
    _update(named)


def _evaluate(model: Any, inputs: dict[str, Any], phase: Callable[[str], None]) -> Any:
    phase(trace.FORWARD)
    model.eval()
    # Upstream has inference_mode, in which composite operators reach a dispatch mode undecomposed,
    # so that their temporaries would not be seen. Neither builds a graph.
    with torch.no_grad():
        loss = model(**inputs)["loss"]
    return loss.detach()


def _perturb(named: list[tuple[str, Any]], scaling_factor: float) -> None:
    for _, param in named:
        z = _noise(param)
        param.data = param.data + scaling_factor * z * EPSILON


def _update(named: list[tuple[str, Any]]) -> None:
    for name, param in named:
        z = _noise(param)
        if "bias" not in name and "layer_norm" not in name and "layernorm" not in name:
            param.data = param.data - LEARNING_RATE * (
                PROJECTED_GRADIENT * z + WEIGHT_DECAY * param.data
            )
        else:
            param.data = param.data - LEARNING_RATE * (PROJECTED_GRADIENT * z)


def _noise(param: Any) -> Any:
    return torch.normal(
        mean=0,
        std=1,
        size=param.data.size(),
        device=param.data.device,
        dtype=param.data.dtype,
    )
