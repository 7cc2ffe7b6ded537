"""The model families: one file each, found by `model_type`, imported when first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from estimator.config_file import asks_for_remote_code, remote_code_refusal
from estimator.errors import InvalidConfigError, UnsupportedModelError
from estimator.model.config import Config
from estimator.model.spec import ModelSpec

FAMILIES: Final[dict[str, str]] = {
    "bloom": "bloom",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "llama": "llama",
    "mistral": "llama",
    "opt": "opt",
    "qwen2": "llama",
    "qwen3": "llama",
}


def read_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the specification of a model from its configuration.

    Args:
        config: the content of its config.json.
        where: the model's name, for messages.

    Raises:
        InvalidConfigError: a field is missing or holds what no model can have.
        UnsupportedModelError: the family has no file here, or exists as remote code only.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InvalidConfigError(f"{where}: the model configuration has no 'model_type'")
    module = FAMILIES.get(model_type)
    if module is None:
        if asks_for_remote_code(config):
            raise remote_code_refusal(config, where)
        if isinstance(config.get("text_config"), Mapping):
            raise UnsupportedModelError(
                f"{where}: {model_type!r} is a multimodal model, which is not supported yet; "
                "only causal language models of text are"
            )
        raise UnsupportedModelError(
            f"{where}: the model family {model_type!r} is not supported yet; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    read = import_module(f"estimator.model.families.{module}").read
    spec: ModelSpec = read(Config(config))
    return spec
