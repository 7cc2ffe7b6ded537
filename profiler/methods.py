"""Fine-tuning methods made real: PEFT's own configuration classes, filled with the request's knobs.

A method that PEFT runs needs no line here: its class names the configuration class, and its fields
are that class's arguments. A method of another library gets a builder in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Final
from unittest import mock

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import EstimateRequest
from estimator.techniques.bottleneck import BottleneckMethod
from estimator.techniques.method import Method
from estimator.techniques.methods.lisa import Lisa
from estimator.techniques.methods.loreft import LoReft
from estimator.techniques.methods.partial import Partial
from profiler import quantized, stack

# Knobs that are no arguments of the configuration: `adapter_dtype` is one of `get_peft_model`,
# `loraplus_lr_ratio` belongs to the optimizer, `update_and_allocate` to the loop, and how adapters
# start (`init_lora_weights`) reads the weights that a meta model does not have, and changes none of
# what the training step holds.
_NOT_CONFIGURATION: Final = frozenset(
    {"adapter_dtype", "loraplus_lr_ratio", "init_lora_weights", "update_and_allocate"}
)


def _partial(model: Any, request: EstimateRequest) -> Any:
    """Freeze the model but for the parameters that the request names, unless others stay as is."""
    method = request.method
    assert isinstance(method, Partial)
    if method.freeze_others:
        chosen = _named(model, method)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in chosen:
                parameter.requires_grad_(True)
    return model


def _named(model: Any, method: Partial) -> set[str]:
    """Return the names of the parameters that a request names.

    As LLaMA-Factory does it: by the names of parameters, with the number of the layer in them
    (model/adapter.py, _setup_freeze_tuning); norms by their class, biases by their name.
    """
    layers = stack.layers_path(model)
    first = stack.num_layers(model.config) - (method.last_layers or 0)
    inputs = set(map(id, model.get_input_embeddings().parameters()))
    of_norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    of_tables = inputs | {
        id(parameter)
        for module in model.modules()
        if "embedding" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }

    def is_named(name: str, parameter: Any) -> bool:
        return (
            any(f".{each}." in f".{name}" for each in method.modules)
            or (method.norms and id(parameter) in of_norms)
            or (method.biases and name.endswith(".bias"))
            or (method.embeddings and id(parameter) in of_tables)
        )

    inside = {
        name: int(name[len(f"{layers}.") :].partition(".")[0])
        for name, _ in model.named_parameters()
        if name.startswith(f"{layers}.")
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = method.last_layers is not None and not any(
        is_named(name, parameters[name]) for name in inside
    )

    def is_left(name: str) -> bool:
        return name in inside and method.last_layers is not None and inside[name] < first

    return {
        name
        for name, parameter in parameters.items()
        if not is_left(name) and (is_named(name, parameter) or (whole and name in inside))
    }


def updated(model: Any, request: EstimateRequest) -> list[tuple[str, Any]]:
    """Return the names and parameters that the optimizer is given, in the model's order."""
    trainable = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    method = request.method
    if not isinstance(method, Partial) or method.freeze_others:
        return trainable
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(every[name]) for name in _named(model, method)}
    return [(name, each) for name, each in trainable if id(each) in chosen]


def _lisa(model: Any, request: EstimateRequest) -> Any:
    """Leave everything trainable where states stay, as if every layer had had its turn before."""
    from profiler import lisa

    method = request.method
    assert isinstance(method, Lisa)
    if not method.keep_states:
        lisa.switch(model, method)
    return model


def _badam(model: Any, _: EstimateRequest) -> Any:
    """Freeze everything but the first layer; BAdam does so itself when the optimizer is built."""
    model.requires_grad_(False)
    model.get_submodule(stack.layers_path(model))[0].requires_grad_(True)
    return model


def _bottleneck(model: Any, request: EstimateRequest) -> Any:
    """Freeze the model and put the adapters library's bottlenecks into its layers."""
    from profiler import bottleneck

    method = request.method
    assert isinstance(method, BottleneckMethod)
    return bottleneck.build(model, method)


def _loreft(model: Any, request: EstimateRequest) -> Any:
    """Hook pyreft's interventions behind the layers of a frozen model."""
    from profiler import reft

    method = request.method
    assert isinstance(method, LoReft)
    return reft.build(model, method)


Builder = Callable[[Any, EstimateRequest], Any]
BUILDERS: Final[dict[str, Builder]] = {
    "partial": _partial,
    "lisa": _lisa,
    "badam": _badam,
    "houlsby_adapter": _bottleneck,
    "pfeiffer_adapter": _bottleneck,
    "loreft": _loreft,
}
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
    if knobs.get("target_modules") == "all-linear":
        knobs["target_modules"] = quantized.unseen_linears(model) or "all-linear"
    try:
        config = getattr(peft, method.peft)(task_type="CAUSAL_LM", **_renamed(knobs, model))
        with quantized.seen_by_peft(), _without_extensions():
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype == "float32")
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequestError(f"PEFT refuses this recipe: {reason}") from error
    if dtype == "base":
        _cast_adapters(adapted)
    elif dtype == "bfloat16":
        _cast_trained(adapted)
    # Matrices that PEFT draws from a seed, such as VeRA's, are buffers that it puts on the CPU.
    for module in adapted.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    return adapted


def _renamed(knobs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Write out a number of tokens as PEFT wants it: which ones makes no difference to memory.

    No modules beside parameters are an empty list: None would mean the modules of PEFT's choice.
    """
    if "adapter_layers" in knobs and knobs["adapter_layers"] is None:
        return {**knobs, "adapter_layers": stack.num_layers(model.config)}
    if knobs.get("target_parameters") and knobs["target_modules"] is None:
        return {**knobs, "target_modules": []}
    if "num_tokens" in knobs:
        rest = {name: knob for name, knob in knobs.items() if name != "num_tokens"}
        return {**rest, "token_indices": list(range(knobs["num_tokens"]))}
    return knobs


def _without_extensions() -> AbstractContextManager[Any]:
    """Keep BOFT from compiling its CUDA extension, without which it takes one butterfly factor.

    Source: peft, tuners/boft/layer.py, get_fbd_cuda and BOFTLayer.update_layer.
    """
    import_module("peft.tuners.boft.layer")
    return mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None)


def _as_peft_takes_it(value: Any) -> Any:
    """Return a knob as PEFT wants it: lists for tuples, None for an empty list."""
    return (list(value) or None) if isinstance(value, tuple) else value


def _cast_trained(model: Any) -> None:
    """Cast what is trained to bf16, as TRL does where the base is packed.

    Source: trl/trainer/sft_trainer.py, SFTTrainer.__init__.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def _cast_adapters(model: Any) -> None:
    """Give adapters the type of the layer that they stand beside.

    PEFT does so when it puts an adapter in place, but not on the meta device
    (tuners/tuners_utils.py, BaseTunerLayer._move_adapter_to_device_of_base_layer).
    """
    layer_class = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for layer in model.modules():
        if not isinstance(layer, layer_class):
            continue
        dtype = quantized.seen_dtype(layer.get_base_layer())
        if dtype.is_floating_point:
            for name in layer.adapter_layer_names:
                getattr(layer, name).to(dtype)
