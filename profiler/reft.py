"""LoReFT as pyreft 0.1.0 and pyvene 0.1.8 run it, as hooks behind the layers of this transformers.

pyvene turns positions into Python lists and back, which fake tensors cannot; the tensors that it
makes of them are made here without values: pyreft/interventions.py, LoreftIntervention;
pyvene/models/intervenable_base.py, _intervention_setter; pyvene/models/modeling_utils.py,
gather_neurons and scatter_neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from estimator.errors import UnsupportedCombinationError
from estimator.techniques.methods.loreft import LoReft
from profiler import stack


class LowRankRotateLayer(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A matrix [n, m] that a parametrization keeps orthogonal (pyreft/interventions.py:13)."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, m, dtype=torch.float32), requires_grad=True)

    def forward(self, x: Any) -> Any:
        """Rotate in the type of the matrix."""
        return torch.matmul(x.to(self.weight.dtype), self.weight)


class LoreftIntervention(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """`h + R^T (W h + b - R h)` (pyreft/interventions.py:27), without an activation function."""

    def __init__(self, width: int, method: LoReft, dtype: torch.dtype) -> None:
        super().__init__()
        self.rotate_layer = _orthogonal(LowRankRotateLayer(width, method.r))
        self.learned_source = nn.Linear(width, method.r, dtype=dtype)
        self.dropout = nn.Dropout(method.dropout)

    def forward(self, base: Any) -> Any:
        """Return the edited states."""
        rotated_base = self.rotate_layer(base)
        output = base + torch.matmul(
            (self.learned_source(base) - rotated_base), self.rotate_layer.weight.T
        )
        return self.dropout(output.to(base.dtype))


def build(model: Any, method: LoReft) -> Any:
    """Freeze a model and hook interventions behind its layers.

    Raises:
        UnsupportedCombinationError: the layers are in no list.
    """
    model.requires_grad_(False)
    path = stack.layers_path(model)
    if path is None:
        raise UnsupportedCombinationError("this model's layers are in no list to hook into")
    layers = model.get_submodule(path)
    for index, layer in enumerate(layers):
        if method.layers and index not in method.layers:
            continue
        dtype = next(
            each.dtype
            for name, each in layer.named_parameters()
            if "norm" in name.lower() or "ln_" in name
        )
        layer.interventions = nn.ModuleList()
        for positions in method.places:
            with torch.device("meta"):
                intervention = LoreftIntervention(model.config.hidden_size, method, dtype)
            layer.interventions.append(intervention)
            layer.register_forward_hook(_hook(len(layer.interventions) - 1, positions))
    return model


def _hook(number: int, positions: int) -> Any:
    """Return pyvene's hook for one intervention (intervenable_base.py:1554)."""

    def hook_callback(module: Any, args: Any, output: Any) -> None:
        intervention = module.interventions[number]
        hidden = output[0] if isinstance(output, tuple) else output
        selected = _gather(hidden, positions)
        _scatter(hidden, intervention(selected), positions)

    return hook_callback


def _gather(output: Any, positions: int) -> Any:
    """Copy everything, take the positions (intervenable_base.py:476, modeling_utils.py:314)."""
    original = output.clone()
    places = _positions(output, positions)
    index = places.reshape(*places.shape, 1).expand(-1, -1, *original.shape[2:])
    return torch.gather(original, 1, index)


def _scatter(output: Any, edited: Any, positions: int) -> None:
    """Write the positions in place (modeling_utils.py:366 to 400)."""
    places = _positions(output, positions)
    rows = torch.arange(output.shape[0]).unsqueeze(1)
    output[rows, places, 0 : output.shape[-1]] = edited


def _positions(output: Any, positions: int) -> Any:
    return torch.zeros(output.shape[0], positions, dtype=torch.int64, device=output.device)


def _orthogonal(layer: LowRankRotateLayer) -> Any:
    """Put torch's parametrization in place, with the square buffer that meta tensors lack.

    On a device with values, `right_inverse` completes the matrix to a square one and keeps it
    (torch/nn/utils/parametrizations.py, _Orthogonal.right_inverse); its QR has no meta kernel, and
    `register_parametrization` passes over that in silence.
    """
    out = nn.utils.parametrizations.orthogonal(layer)
    parametrization = out.parametrizations.weight[0]
    if parametrization.base is None:
        rows = parametrization.shape[0]
        parametrization.base = torch.empty(rows, rows, dtype=torch.float32, device="meta")
    return out
