"""The fine-tuning method of a live model: PEFT's configuration in the words of the request."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, Final

from estimator.request import METHODS
from estimator.techniques.method import Method
from profiler.live.findings import Findings
from profiler.live.partial import partial

_BY_CONFIGURATION: Final[dict[str, type[Method]]] = {
    each.peft: each for each in METHODS if each.peft is not None
}

# Fields of PEFT's configurations that cost no memory in the training step: names, seeds, scales,
# how weights start. What is read off the model itself is here too.
_NO_MEMORY: Final = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "fan_in_fan_out", "megatron_core", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "init_weights",
        "init_ia3_weights", "init_vector_bank_bound", "init_logits_std", "random_loc_seed",
        "projection_prng_key", "d_initial", "eps", "deltaT", "beta1", "beta2", "orth_reg_weight",
        "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
        "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    }
)  # fmt: skip
# What a method reads from elsewhere: AdaLoRA's rank is `init_r`, and PEFT fills in its ranks.
_READ_ELSEWHERE: Final[dict[str, frozenset[str]]] = {
    "adalora": frozenset({"r", "rank_pattern", "alpha_pattern", "init_lora_weights"}),
    "trainable_tokens": frozenset({"token_indices", "target_modules"}),
    "adaption_prompt": frozenset({"target_modules"}),
}
_WAYS_TO_START: Final = ("gaussian", "olora", "orthogonal", "pissa", "loftq")
# Said by the paths of the live adapters, whatever way they were chosen.
_CHOICES: Final = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "feedforward_modules",
)  # fmt: skip


def method(model: Any, config: dict[str, Any], findings: Findings) -> dict[str, Any]:
    """Return the section `method` of a live model.

    Args:
        model: as the Trainer holds it: a PeftModel, or a model with or without PEFT's adapters.
        config: the model's configuration.
    """
    configurations = getattr(model, "peft_config", None)
    if not isinstance(configurations, Mapping):
        return _without_peft(model, config, findings)
    if len(configurations) != 1:
        findings.unknown.append(f"{len(configurations)} adapters at once: {_names(configurations)}")
        return {"name": "lora"}
    configuration = next(iter(configurations.values()))
    kind = _BY_CONFIGURATION.get(type(configuration).__name__)
    if kind is None:
        findings.unknown.append(f"PEFT's {type(configuration).__name__}")
        return {"name": "lora"}
    return _with_peft(model, configuration, kind, findings)


def base_model(model: Any) -> Any:
    """Return transformers' own model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _without_peft(model: Any, config: dict[str, Any], findings: Findings) -> dict[str, Any]:
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    if not frozen:
        return {"name": "full"}
    found = partial(model, config)
    if found is None:
        findings.unknown.append(
            f"{len(frozen)} parameters that are frozen without PEFT, such as {frozen[0]}"
        )
    return found or {"name": "full"}


def _with_peft(
    model: Any, configuration: Any, kind: type[Method], findings: Findings
) -> dict[str, Any]:
    section: dict[str, Any] = {"name": str(kind.__struct_config__.tag)}
    elsewhere = _READ_ELSEWHERE.get(section["name"], frozenset())
    known = set(kind.__struct_fields__) - elsewhere
    for field in dataclasses.fields(configuration):
        value = _plain(getattr(configuration, field.name))
        if field.name in known:
            if value is not None:
                section[field.name] = value
        elif field.name not in (_NO_MEMORY | elsewhere | {*_CHOICES}) and (
            value != _plain(_default(field))
        ):
            findings.unknown.append(f"{field.name}={value!r} of {type(configuration).__name__}")
    _translate(model, configuration, section, findings)
    if "target_modules" in known:
        _name_targets(model, section)
    if "adapter_dtype" in known:
        section["adapter_dtype"] = _adapter_dtype(model, findings)
    default = kind()
    return {
        name: value
        for name, value in section.items()
        if name in ("name", "target_modules") or value != _plain(getattr(default, name))
    }


def _translate(model: Any, configuration: Any, section: dict[str, Any], findings: Findings) -> None:
    """Say in the request's words what PEFT says otherwise."""
    start = section.get("init_lora_weights")
    if isinstance(start, str):
        known = next((each for each in _WAYS_TO_START if start.startswith(each)), None)
        section["init_lora_weights"] = known or True
        if known is None:
            findings.assumed.append(f"init_lora_weights {start!r} costs no memory in the steps")
    indices = section.get("trainable_token_indices")
    if isinstance(indices, dict):
        table = type(configuration).__name__
        if len(indices) != 1:
            findings.unknown.append(f"trainable_token_indices of several tables of {table}")
        section["trainable_token_indices"] = next(iter(indices.values()), [])
    if section["name"] == "trainable_tokens":
        tokens = configuration.token_indices
        if isinstance(tokens, dict) and len(tokens) != 1:
            findings.unknown.append("token_indices of several tables")
        section["num_tokens"] = len(
            next(iter(tokens.values())) if isinstance(tokens, dict) else tokens
        )
    if section["name"] == "prompt_tuning" and section.get("prompt_tuning_init") == "TEXT":
        section["prompt_tuning_init"] = "RANDOM"
    if section["name"] == "adaption_prompt":
        layers = base_model(model).config.num_hidden_layers
        if section.get("adapter_layers") == layers:
            del section["adapter_layers"]


def _name_targets(model: Any, section: dict[str, Any]) -> None:
    """Name the layers that have adapters, shortly where the ends of their paths tell them apart."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    adapted, fed_forward = _adapted(model)
    base = base_model(model)
    head = base.get_output_embeddings()
    modules = dict(_plain_paths(base))
    linears = {
        path
        for path, module in modules.items()
        if module is not head
        and (isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "in_features"))
    }
    for name in _CHOICES:
        section.pop(name, None)
    if adapted:
        every = adapted == linears
        section["target_modules"] = "all-linear" if every else _shortest(adapted, set(modules))
    elif section.get("target_parameters"):
        section["target_modules"] = []
    if section["name"] == "ia3":
        section["feedforward_modules"] = _shortest(fed_forward, set(modules))


def _adapted(model: Any) -> tuple[set[str], set[str]]:
    """Return the paths of the layers with an adapter, and of those whose input IA³ scales."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        path: module
        for path, module in base_model(model).named_modules()
        if isinstance(module, BaseTunerLayer)
        and type(module).__name__ not in ("ParamWrapper", "TrainableTokensLayer")
    }
    return set(layers), {
        path for path, module in layers.items() if getattr(module, "is_feedforward", False)
    }


def _plain_paths(base: Any) -> Iterable[tuple[str, Any]]:
    """Yield the model's own modules by the paths that they had before adapters were put there."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    inside: list[str] = []
    for path, module in base.named_modules():
        if any(path.startswith(each) for each in inside):
            continue
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inside.append(f"{path}.")
            original = (
                module.get_base_layer()
                if isinstance(module, BaseTunerLayer)
                else module.original_module
            )
            yield path, original
        else:
            yield path, module


def _shortest(chosen: set[str], among: set[str]) -> list[str]:
    """Return the last parts of the paths if they mean the chosen layers, else the whole paths.

    Example:
        >>> _shortest({"0.q_proj", "1.q_proj"}, {"0.q_proj", "1.q_proj", "0.v_proj"})
        ['q_proj']
        >>> _shortest({"1.q_proj"}, {"0.q_proj", "1.q_proj"})
        ['1.q_proj']
    """
    ends = {path.rpartition(".")[2] for path in chosen}
    meant = {path for path in among if path.rpartition(".")[2] in ends}
    return sorted(ends if meant == chosen else chosen)


def _adapter_dtype(model: Any, findings: Findings) -> str:
    """Return the word for the type that adapters are stored in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters, bases = set(), set()
    for module in base_model(model).modules():
        if isinstance(module, BaseTunerLayer):
            adapters |= {each.dtype for each in module.parameters() if each.requires_grad}
            weight = getattr(module.get_base_layer(), "weight", None)
            bases |= {weight.dtype} if weight is not None else set()
    names = {str(each).removeprefix("torch.") for each in adapters}
    if not names or names == {"float32"}:
        return "float32"
    if adapters == bases:
        return "base"
    if names == {"bfloat16"}:
        return "bfloat16"
    findings.unknown.append(f"adapters in {', '.join(sorted(names))}")
    return "float32"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _plain(value: Any) -> Any:
    """Return a value as JSON would hold it; sets are sorted, empty lists are none."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value) or None
    if isinstance(value, (list, tuple)):
        return list(value) or None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value or None if isinstance(value, dict) else value


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
