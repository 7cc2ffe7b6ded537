"""The weights of a live model: its configuration, its types, how they are packed, how many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from estimator.request import QUANTIZATIONS
from profiler.live.findings import Findings
from profiler.live.method import base_model

_WORDS: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_CONFIGURED: Final = {
    "gptq": ("bits", "group_size", "desc_act"),
    "awq": ("group_size",),
    "hqq": (),
    "torchao": (),
}
# Keys of a configuration that the request says itself, or that name this machine's software.
_NOT_THE_MODEL: Final = (
    "quantization_config", "dtype", "torch_dtype", "transformers_version", "auto_map", "use_cache",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
)  # fmt: skip


def config_of(model: Any) -> dict[str, Any]:
    """Return the configuration of a live model as its config.json would hold it now."""
    config = base_model(model).config
    document: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    document = {key: each for key, each in document.items() if key not in _NOT_THE_MODEL}
    name = str(document.pop("_name_or_path", "") or "")
    if name:
        # A folder of this machine is nobody's business but its own.
        document["_name_or_path"] = Path(name).name if Path(name).exists() else name
    return document


def refuse_other_models(model: Any, findings: Findings) -> None:
    """Name what is no causal language model of transformers, and what forward was put in place."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base = base_model(model)
    kind = type(base).__name__
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        findings.unknown.append(f"a {kind}, which is no causal language model of transformers")
        return
    for each in (base, type(base)):
        forward = getattr(each, "_original_forward", each.forward)
        owner = _defining_module(forward)
        if owner.partition(".")[0] not in ("transformers", "peft", "trl", "accelerate", "torch"):
            if not owner.startswith("liger_kernel."):
                findings.unknown.append(f"a forward pass that {owner} put in place of {kind}'s")
            return


def _defining_module(function: Any) -> str:
    import inspect

    return str(inspect.unwrap(getattr(function, "__func__", function)).__module__)


def parameters(model: Any) -> tuple[int, int]:
    """Count all and the trainable parameters; tied ones once, packed ones by what they stand for.

    Source: peft, peft_model.py, PeftModel.get_nb_trainable_parameters.
    """
    total = trainable = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor that a live model keeps: parameters, buffers, scales of packed layers."""
    from profiler import quantized

    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        # An 8-bit layer hands its scales over to its state in the first forward pass.
        yield from (each for each in quantized.tensors(module).values() if each is not None)


def precision(model: Any, findings: Findings) -> dict[str, Any]:
    """Return the fields that say how the base weights are stored, and how they are packed."""
    packed = {path: module for path, module in base_model(model).named_modules() if _packs(module)}
    plain = _plain_types(model, packed)
    if not packed:
        if len(plain) > 1:
            shown = ", ".join(f"{count} in {name}" for name, count in plain.most_common())
            findings.unknown.append(f"base weights of several types: {shown} parameters")
        return {"precision": _word(plain.most_common(1)[0][0], findings)}
    stored = _stored(model, packed, findings)
    section = _quantization(model, packed, findings)
    fields: dict[str, Any] = {"precision": _word(stored, findings), "quantization": section}
    upcasts = {str(kind.__struct_config__.tag): kind.upcasts for kind in QUANTIZATIONS}
    if upcasts.get(section["name"]) and stored != "float32":
        # What stays unpacked tells whether PEFT's preparation has raised it.
        section["prepare_kbit"] = set(plain) == {"float32"}
    return fields


def _plain_types(model: Any, packed: dict[str, Any]) -> Counter[str]:
    """Count the base's parameters that are not packed, by their type."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    beside: set[int] = {id(each) for module in packed.values() for each in module.parameters()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            own = {id(each) for each in module.get_base_layer().parameters()}
            beside |= {id(each) for each in module.parameters()} - own
        elif isinstance(module, ModulesToSaveWrapper):
            beside |= {id(each) for each in module.modules_to_save.parameters()}
    encoder = getattr(model, "prompt_encoder", None)
    beside |= {id(each) for each in encoder.parameters()} if encoder is not None else set()
    types: Counter[str] = Counter()
    for parameter in model.parameters():
        if id(parameter) not in beside:
            types[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return types


def _packs(module: Any) -> bool:
    from profiler import quantized

    return quantized.packing(module) is not None


def _stored(model: Any, packed: dict[str, Any], findings: Findings) -> str:
    """Return the type that the packed weights had when they were loaded."""
    for module in packed.values():
        state = getattr(module.weight, "quant_state", None) if hasattr(module, "weight") else None
        if state is not None:
            return str(state.dtype).removeprefix("torch.")
    asked = base_model(model).config.dtype
    if asked is None:
        findings.assumed.append("the model does not say which type it was loaded in: bfloat16")
        return "bfloat16"
    return str(asked).removeprefix("torch.")


def _quantization(model: Any, packed: dict[str, Any], findings: Findings) -> dict[str, Any]:
    """Return the section `quantization` of a live model."""
    module = next(iter(packed.values()))
    kind = type(module).__name__
    if hasattr(module, "quant_storage"):
        section = {
            "name": str(module.weight.quant_type),
            "double_quant": bool(module.weight.compress_statistics),
            "compute_dtype": _dtype(module.compute_dtype) or "float32",
            "quant_storage": _dtype(module.quant_storage),
        }
    elif kind.endswith("Linear8bitLt"):
        section = {"name": "int8", "threshold": float(module.state.threshold)}
    else:
        return _configured(model, kind, findings)
    left_out = _left_out(model, packed)
    return {**section, "skip_modules": left_out} if left_out else section


def _left_out(model: Any, packed: dict[str, Any]) -> list[str]:
    """Return the ends of the names of linear layers that are not packed, beside the head alone."""
    from torch import nn

    base = base_model(model)
    head = base.get_output_embeddings()
    adapters = ("lora_", "modules_to_save", "original_module")
    found = {
        path.removesuffix(".base_layer").rpartition(".")[2]: module
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and path not in packed
        and not any(each in path for each in adapters)
    }
    return [] if all(module is head for module in found.values()) else sorted(found)


def _configured(model: Any, kind: str, findings: Findings) -> dict[str, Any]:
    """Return what the model's own configuration says of a format without settings in its layers."""
    config = getattr(base_model(model).config, "quantization_config", None)
    given = config if isinstance(config, dict) else config.to_dict() if config is not None else {}
    name = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    if name not in _CONFIGURED:
        findings.unknown.append(f"weights packed as {kind} ({name})")
        return {"name": "nf4"}
    section = {field: given[field] for field in _CONFIGURED[name] if field in given}
    if name == "hqq":
        settings = given.get("quant_config", {}).get("weight_quant_params", {})
        section = {
            "bits": settings.get("nbits", 4),
            "group_size": settings.get("group_size", 64),
            "axis": settings.get("axis", 1),
        }
    return {"name": "torchao_int8" if name == "torchao" else name, **section}


def _word(dtype: str, findings: Findings) -> str:
    if dtype not in _WORDS:
        findings.unknown.append(f"weights stored in {dtype}")
    return _WORDS.get(dtype, "bf16")


def _dtype(dtype: Any) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")
