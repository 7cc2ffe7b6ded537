"""Training some of a model's own weights: which words of method `partial` mean the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from estimator.errors import EstimatorError
from estimator.request import parse_request


def partial(base: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section `partial` that trains the very parameters that a live model trains.

    Each wording is tried on a model without weights, by the rules of the dry run.

    Args:
        base: transformers' model with some parameters frozen.
        config: its configuration.
    """
    trained = {name for name, each in base.named_parameters() if each.requires_grad}
    for section in _wordings(base, trained):
        if _trained_by(section, config) == trained:
            return section
    return None


def _wordings(base: Any, trained: set[str]) -> Iterator[dict[str, Any]]:
    """Yield what the trained names may mean, from the shortest on."""
    from profiler import stack

    name = {"name": "partial"}
    yield {**name, "biases": True}
    yield {**name, "norms": True}
    layers = f"{stack.layers_path(base)}."
    inside = {int(each[len(layers) :].partition(".")[0]) for each in trained if layers in each}
    outside = sorted({_module(each) for each in trained if not each.startswith(layers)})
    if inside:
        count = stack.num_layers(base.config) - min(inside)
        last = {**name, "last_layers": count}
        yield {**last, "modules": outside} if outside else last
        within = sorted({_module(each) for each in trained})
        yield {**last, "modules": within}
        yield {**name, "modules": within}
    else:
        yield {**name, "modules": outside}


def _module(name: str) -> str:
    """Return the last word of the module that a parameter belongs to.

    Example:
        >>> _module("model.layers.0.self_attn.q_proj.weight")
        'q_proj'
    """
    return name.rpartition(".")[0].rpartition(".")[2]


def _trained_by(section: dict[str, Any], config: dict[str, Any]) -> set[str]:
    """Return the names of the parameters that a wording trains."""
    from profiler import workload

    request = parse_request({"model": {"config": config}, "method": section})
    try:
        model = workload.meta_model(request, workload.model_config(config))
    except EstimatorError:
        return set()
    return {name for name, each in model.named_parameters() if each.requires_grad}
