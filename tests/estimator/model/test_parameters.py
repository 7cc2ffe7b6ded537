"""Parameter counts against what transformers builds and what PEFT adds, to the integer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest

from estimator.catalog.model import CatalogModel, models
from estimator.model.families import FAMILIES, read_spec
from estimator.request import parse_request
from estimator.resolve import resolve

# Printed by PEFT's `print_trainable_parameters` or counted by it on the meta model, see below.
NAMED_TARGETS = (
    ("meta-llama/Llama-3.2-1B", 8, ("q_proj", "v_proj")),
    ("Qwen/Qwen2.5-7B", 64, ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("mistralai/Mistral-7B-v0.3", 16, ("gate_proj", "up_proj", "down_proj")),
)


def _distinct(family: str) -> Iterator[tuple[CatalogModel, str]]:
    """Yield the models of a family with a configuration that no earlier one has."""
    seen: set[str] = set()
    for model in models():
        text = json.dumps(dict(model.config), sort_keys=True)
        if model.family == family and text not in seen:
            seen.add(text)
            yield model, text


@cache
def _built(config: str) -> Any:
    """Return the causal language model that transformers builds on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trainable_with_peft(config: Mapping[str, Any], r: int, targets: Any) -> int:
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = get_peft_model(
            _built.__wrapped__(json.dumps(dict(config), sort_keys=True)),
            LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"),
        )
    trainable, _ = model.get_nb_trainable_parameters()
    return int(trainable)


def _trainable(config: Mapping[str, Any], r: int, targets: Any) -> int:
    request = parse_request(
        {
            "model": {"config": dict(config)},
            "method": {"name": "lora", "r": r, "target_modules": targets},
        }
    )
    return resolve(request, config, "model").spec.trainable_parameters()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_catalogue_model_has_the_parameters_that_transformers_builds(family: str) -> None:
    ours, theirs = {}, {}
    for model, config in _distinct(family):
        ours[model.id] = read_spec(model.config, model.id).total_parameters()
        theirs[model.id] = _parameters(_built(config))
    assert ours == theirs


def _smallest(family: str) -> CatalogModel | None:
    of_family = [model for model, _ in _distinct(family)]
    return min(of_family, key=lambda model: model.parameters.computed, default=None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lora_on_every_linear_layer_trains_what_peft_counts(family: str) -> None:
    model = _smallest(family)
    if model is None:
        pytest.skip(f"the catalogue has no {family} model")
    ours = _trainable(model.config, 16, "all-linear")
    assert ours == _trainable_with_peft(model.config, 16, "all-linear")


@pytest.mark.parametrize(("name", "r", "targets"), NAMED_TARGETS)
def test_lora_on_named_layers_trains_what_peft_counts(
    name: str, r: int, targets: tuple[str, ...]
) -> None:
    (config,) = (model.config for model in models() if model.id == name)
    assert _trainable(config, r, list(targets)) == _trainable_with_peft(config, r, list(targets))
