"""Fine-tuning methods made real: PEFT's own configuration classes, filled with the request's knobs.

A method that PEFT runs needs no line here: its class names the configuration class, and its fields
are that class's arguments. A method of another library gets a builder in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import EstimateRequest
from estimator.techniques.method import Method

# Knobs that are arguments of `get_peft_model`, not of the configuration.
_NOT_CONFIGURATION: Final = frozenset({"adapter_dtype"})

Builder = Callable[[Any, EstimateRequest], Any]
BUILDERS: Final[dict[str, Builder]] = {}
"""What builds a method that PEFT does not: given the model, it returns the model to train."""


def trained(model: Any, request: EstimateRequest) -> Any:
    """Return the model with the request's method in place, on the meta device as it was given.

    Raises:
        InvalidRequestError: PEFT refuses the recipe; its reason is in the message.
        UnsupportedCombinationError: nothing here runs the method.
    """
    method: Method = request.method
    if method.name in BUILDERS:
        return BUILDERS[method.name](model, request)
    if method.peft is not None:
        return _with_peft(model, method)
    if method.trains_base:
        return model
    raise UnsupportedCombinationError(f"the dry run cannot run method {method.name!r} yet")


def _with_peft(model: Any, method: Method) -> Any:
    """Freeze the model and put PEFT's adapters in place."""
    peft = import_module("peft")
    assert method.peft is not None
    knobs = {
        name: _as_peft_takes_it(getattr(method, name))
        for name in method.__struct_fields__
        if name not in _NOT_CONFIGURATION
    }
    dtype = getattr(method, "adapter_dtype", "float32")
    try:
        config = getattr(peft, method.peft)(task_type="CAUSAL_LM", **knobs)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype == "float32")
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequestError(f"PEFT refuses this recipe: {reason}") from error
    if dtype == "base":
        _cast_adapters(adapted)
    return adapted


def _as_peft_takes_it(value: Any) -> Any:
    """Return a knob as PEFT wants it: lists for tuples, None for an empty list."""
    return (list(value) or None) if isinstance(value, tuple) else value


def _cast_adapters(model: Any) -> None:
    """Give adapters the type of the layer that they stand beside.

    PEFT does so when it puts an adapter in place, but not on the meta device
    (tuners/tuners_utils.py, BaseTunerLayer._move_adapter_to_device_of_base_layer).
    """
    layer_class = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for layer in model.modules():
        if not isinstance(layer, layer_class):
            continue
        dtype = layer.get_base_layer().weight.dtype
        if dtype.is_floating_point:
            for name in layer.adapter_layer_names:
                getattr(layer, name).to(dtype)
