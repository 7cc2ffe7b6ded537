"""The bottleneck adapters of the `adapters` library, inside the layers of this transformers.

The library (1.3.0) pins transformers 4.57, so its modules and the calls in its layers are written
here as there: adapters/methods/modeling.py, Adapter; adapters/methods/bottleneck.py,
BottleneckLayer; adapters/models/{llama,mistral,gpt2}/modeling_*.py. One adapter, no composition,
no dropout, no gating and no layer norm of its own, which is what `double_seq_bn` and `seq_bn` ask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import get_activation

from estimator.errors import UnsupportedCombinationError
from estimator.techniques.bottleneck import BottleneckMethod
from profiler import stack


class Adapter(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """One sequential bottleneck (methods/modeling.py, Adapter)."""

    def __init__(self, input_size: int, method: BottleneckMethod, dtype: torch.dtype) -> None:
        super().__init__()
        size = max(1, int(input_size // method.reduction_factor))
        self.original_ln_before = method.sums_first
        activation = get_activation(method.activation)
        self.adapter_down = nn.Sequential(nn.Linear(input_size, size, dtype=dtype), activation)
        self.adapter_up = nn.Linear(size, input_size, dtype=dtype)
        self.scaling = 1.0
        self.dropout = nn.Dropout(p=0.0)

    def pre_forward(self, hidden_states: Any, input_tensor: Any) -> tuple[Any, Any]:
        """Return what the adapter reads, and its residual (methods/modeling.py:137)."""
        residual = hidden_states
        if self.original_ln_before:
            hidden_states = hidden_states + input_tensor
        return hidden_states, residual

    def forward(self, x: Any, residual_input: Any) -> tuple[Any, Any, Any]:
        """Return the output, and the two inner states (methods/modeling.py:189)."""
        down = self.adapter_down(x)
        up = self.adapter_up(down)
        up = up * self.scaling
        output = self.dropout(up)
        output = output + residual_input
        return output, down, up

    def post_forward(self, hidden_states: Any, input_tensor: Any) -> Any:
        """Add the sublayer's residual (methods/modeling.py:227, original_ln_after)."""
        return hidden_states + input_tensor


class BottleneckLayer(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """The place of an adapter in a layer (methods/bottleneck.py, BottleneckLayer)."""

    def __init__(self, adapter: Adapter | None) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, hidden_states: Any, residual_input: Any) -> Any:
        """Run the adapter, or only add the residual (methods/bottleneck.py:339)."""
        if self.adapter is None:
            return hidden_states + residual_input
        input_hidden_states = hidden_states  # noqa: F841 - the name lives as long as there
        state = hidden_states, residual_input, residual_input, None
        state = self._compose(state)
        hidden_states, residual_input, _, _ = state
        return self.adapter.post_forward(hidden_states, residual_input)

    def _compose(self, state: Any) -> Any:
        state = self._pre_block(state)
        return self._compose_single(state)

    def _pre_block(self, state: Any) -> Any:
        assert self.adapter is not None
        hidden_states, residual = self.adapter.pre_forward(state[0], state[1])
        return hidden_states, state[1], residual, state[3]

    def _compose_single(self, state: Any) -> Any:
        assert self.adapter is not None
        layer_output = self.adapter(state[0], residual_input=state[2])
        hidden_states, up = layer_output[0], layer_output[2]
        return hidden_states, state[1], state[2], up


def build(model: Any, method: BottleneckMethod) -> Any:
    """Freeze a model and put adapters into its layers.

    Raises:
        UnsupportedCombinationError: a family that the library has no layers for.
    """
    model.requires_grad_(False)
    path = stack.layers_path(model)
    layers = model.get_submodule(path) if path else ()
    for layer in layers:
        known = _CLASSES.get(type(layer).__name__)
        if known is None:
            raise UnsupportedCombinationError(
                f"the adapters library has no layer for {type(layer).__name__}"
            )
        norm = layer.get_submodule(known.norm)
        dtype = torch.float32 if method.adapter_dtype == "float32" else norm.weight.dtype
        for site in ("attention_adapters", "output_adapters"):
            adapter = None
            if site in method.sites:
                with torch.device("meta"):
                    adapter = Adapter(model.config.hidden_size, method, dtype)
            setattr(layer, site, BottleneckLayer(adapter))
        layer.__class__ = type(
            f"{type(layer).__name__}WithAdapters", (type(layer),), {"forward": known.forward}
        )
    return model


class _LlamaLayer:
    """models/llama/modeling_llama.py, LlamaDecoderLayerWithAdapters; Mistral's is the same."""

    norm = "input_layernorm"

    def forward(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = self.attention_adapters(hidden_states, residual)
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return self.output_adapters(hidden_states, residual)


class _Gpt2Block:
    """models/gpt2/modeling_gpt2.py, GPT2BlockWithAdapters."""

    norm = "ln_1"

    def forward(
        self: Any,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        **kwargs: Any,
    ) -> Any:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output, _ = self.attn(
            hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        hidden_states = self.attention_adapters(attn_output, residual)
        residual = hidden_states
        hidden_states = self.ln_2(hidden_states)
        feed_forward_hidden_states = self.mlp(hidden_states)
        return self.output_adapters(feed_forward_hidden_states, residual)


_CLASSES: dict[str, Any] = {
    "LlamaDecoderLayer": _LlamaLayer,
    "MistralDecoderLayer": _LlamaLayer,
    "GPT2Block": _Gpt2Block,
}
