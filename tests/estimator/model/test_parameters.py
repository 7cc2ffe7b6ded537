"""Parameter counts against what transformers builds and what PEFT adds, to the integer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from estimator.catalog.model import CatalogModel, models
from estimator.model.families import FAMILIES, read_spec
from estimator.request import parse_request
from estimator.resolve import resolve

# PEFT 0.21 asks transformers for a property that 5.23 has renamed, and says that it transposes
# the weights of GPT-2's Conv1D layers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def _built(config: Mapping[str, Any]) -> Any:
    """Return the causal language model that transformers builds on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads(json.dumps(dict(config)))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )


def _distinct(family: str) -> list[CatalogModel]:
    """Return the models of a family without those whose configuration an earlier one has."""
    by_config = {
        json.dumps(dict(model.config), sort_keys=True): model
        for model in reversed(models())
        if model.family == family
    }
    return list(reversed(by_config.values()))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_catalogue_model_has_the_parameters_that_transformers_builds(family: str) -> None:
    ours, theirs = {}, {}
    for model in _distinct(family):
        ours[model.id] = read_spec(model.config, model.id).total_parameters()
        theirs[model.id] = sum(each.numel() for each in _built(model.config).parameters())
    assert ours == theirs


def _counted_by_peft(config: Mapping[str, Any], r: int, targets: str | Sequence[str]) -> int:
    import torch
    from peft import LoraConfig, get_peft_model

    chosen = targets if isinstance(targets, str) else list(targets)
    with torch.device("meta"):
        model = get_peft_model(
            _built(config), LoraConfig(r=r, target_modules=chosen, task_type="CAUSAL_LM")
        )
    trainable, _ = model.get_nb_trainable_parameters()
    return int(trainable)


def _trainable(config: Mapping[str, Any], r: int, targets: str | Sequence[str]) -> int:
    request = parse_request(
        {
            "model": {"config": dict(config)},
            "method": {
                "name": "lora",
                "r": r,
                "target_modules": targets if isinstance(targets, str) else list(targets),
            },
        }
    )
    return resolve(request, config, "model").spec.trainable_parameters()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lora_on_every_linear_layer_trains_what_peft_counts(family: str) -> None:
    known = _distinct(family)
    if not known:
        pytest.skip(f"the catalogue has no {family} model")
    smallest = min(known, key=lambda model: model.parameters.computed)
    ours = _trainable(smallest.config, 16, "all-linear")
    assert ours == _counted_by_peft(smallest.config, 16, "all-linear")


@pytest.mark.parametrize(
    ("name", "r", "targets"),
    [
        ("meta-llama/Llama-3.2-1B", 8, ("q_proj", "v_proj")),
        ("Qwen/Qwen2.5-7B", 64, ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mistralai/Mistral-7B-v0.3", 16, ("gate_proj", "up_proj", "down_proj")),
        ("tiiuae/falcon-40b", 32, ("query_key_value", "dense")),
        ("bigscience/bloom-7b1", 4, ("query_key_value",)),
    ],
)
def test_lora_on_named_layers_trains_what_peft_counts(
    name: str, r: int, targets: tuple[str, ...]
) -> None:
    (config,) = (model.config for model in models() if model.id == name)
    assert _trainable(config, r, targets) == _counted_by_peft(config, r, targets)
