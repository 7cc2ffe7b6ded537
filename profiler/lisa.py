"""LISA on a real model: which layers are trained in a step, and what the optimizer has seen."""

from __future__ import annotations

from typing import Any

from estimator.techniques.method import Method
from estimator.techniques.methods.lisa import Lisa
from profiler import stack


def switch(model: Any, method: Lisa) -> None:
    """Freeze all decoder layers but the last ones: one of the draws that a run may have.

    Source: LMFlow, pipeline/utils/lisa_trainer.py,
    DynamicLayerActivationCallback.switch_active_layers.
    """
    layers = model.get_submodule(stack.layers_path(model))
    layers.requires_grad_(False)
    for layer in layers[len(layers) - method.activated_layers :]:
        layer.requires_grad_(True)


def begin_step(model: Any, method: Method, optimizer: Any) -> None:
    """Switch layers as a callback does when a step begins.

    Where states stay, the first step trains all layers: it stands for the draws that came before,
    after which the optimizer has states of every layer.
    """
    if isinstance(method, Lisa) and method.keep_states and optimizer.state:
        switch(model, method)
