"""Quantized base weights made real: which library's layer holds them, by the request's name."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, Final
from unittest import mock

from estimator.request import EstimateRequest
from profiler.quantizations import bnb_4bit, bnb_8bit, gptqmodel, hqq, torchao_int8

FORMATS: Final[dict[str, ModuleType]] = {
    "nf4": bnb_4bit,
    "fp4": bnb_4bit,
    "int8": bnb_8bit,
    "torchao_int8": torchao_int8,
    "gptq": gptqmodel,
    "awq": gptqmodel,
    "hqq": hqq,
}
"""The module that builds each quantization: `with_linears`, `packs`, `pack` and `tensors`."""

_MODULES: Final = tuple(dict.fromkeys(FORMATS.values()))

Buffers = Iterable[tuple[str, int]]


def with_packed_linears(model: Any, request: EstimateRequest, stored: str) -> Any:
    """Replace the linear layers of a meta model by those of the request's quantization."""
    assert request.quantization is not None
    model = FORMATS[request.quantization.name].with_linears(model, request.quantization, stored)
    model.is_quantized = True
    model.config._is_quantized = True
    return model


def packing(module: Any) -> ModuleType | None:
    """Return what packs a module's weight; None for a module with plain weights."""
    return next((each for each in _MODULES if each.packs(module)), None)


def seen_dtype(module: Any) -> Any:
    """Return the type that a layer's weight has once it is packed, which PEFT looks at."""
    format_of = packing(module)
    return module.weight.dtype if format_of is None else format_of.seen_dtype(module)


def tensors(module: Any) -> dict[str, Any]:
    """Return what a packed layer keeps beside its parameters, by name; of others, nothing."""
    format_of = packing(module)
    kept: dict[str, Any] = format_of.tensors(module) if format_of is not None else {}
    return kept


def unseen_linears(model: Any) -> list[str]:
    """Return the paths of a model's linear layers, if some are of classes that PEFT cannot name.

    PEFT's `all-linear` knows torch's and transformers' classes; the request means every layer.

    Source: peft, tuners/tuners_utils.py, _maybe_include_all_linear_layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, found, plain = model.get_output_embeddings(), [], (torch.nn.Linear, Conv1D)
    packed = {path for path, each in model.named_modules() if packing(each) is not None}
    for path, module in model.named_modules():
        if module is not head and (path in packed or isinstance(module, plain)):
            found.append(path)
    unseen = any(not isinstance(model.get_submodule(path), plain) for path in packed)
    return found if unseen else []


def parts(parameter: Any) -> dict[str, Any]:
    """Return the tensors that a parameter is made of, by the end of their name."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return {"": parameter}
    names, _ = parameter.__tensor_flatten__()
    return {f".{name}": getattr(parameter, name) for name in names}


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep torchao, which PEFT asks about every layer, from listing the kernels it lacks here.

    Nor does torch tell anybody what torchao registers twice.
    """
    logs = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def on_cuda() -> Iterator[None]:
    """Let the libraries take the branches that they take on a GPU."""
    with bnb_8bit.on_cuda(), seen_by_peft():
        yield


@contextlib.contextmanager
def seen_by_peft() -> Iterator[None]:
    """Let PEFT know packed layers and weights, which it would know by their class on a GPU."""
    # hqq's imports PEFT, whose modules gptqmodel's then finds.
    with hqq.seen_by_peft(), gptqmodel.seen_by_peft(), _dequantized_by_dora():
        yield


@contextlib.contextmanager
def _dequantized_by_dora() -> Iterator[None]:
    """Let PEFT's DoRA dequantize packed weights."""
    dora = sys.modules.get("peft.tuners.lora.dora")
    if dora is None:
        yield
        return
    original = dora.dequantize_module_weight

    def dequantize_module_weight(module: Any) -> Any:
        if bnb_4bit.packs(module):
            return bnb_4bit.dequantized(module)
        return original(module)

    # PEFT copies a layer while it builds, for FSDP; meta weights cannot be copied.
    with mock.patch.multiple(
        dora, dequantize_module_weight=dequantize_module_weight, deepcopy=lambda layer: layer
    ):
        yield


def kernels() -> dict[str, Callable[..., Any]]:
    """Return what stands for operators of these libraries, by the operator's name."""
    return bnb_8bit.kernels()


WORKSPACES: Final[dict[str, Callable[[tuple[Any, ...], Any], Buffers]]] = {
    bnb_8bit.QUANTIZE: bnb_8bit.quantization_buffers,
    bnb_8bit.MULTIPLY: bnb_8bit.product_buffers,
    bnb_8bit.MULTIPLY_MIXED: bnb_8bit.product_buffers,
}
"""What the kernels take inside themselves, by the operator's name."""
