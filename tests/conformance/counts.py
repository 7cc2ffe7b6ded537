"""How many parameters PEFT itself says it trains, on models that are built from a configuration."""

from __future__ import annotations

import warnings
from typing import Any

from estimator.request import parse_request
from estimator.resolve import resolve
from tests.conformance.cases import MODELS

# Three families: gated and tied, plain with learnt positions, grouped heads without ties.
THREE = ("llama", "gpt2", "qwen2")


def counted_by_peft(method: Any, model: str, **changes: Any) -> tuple[int, int]:
    """Return the trainable and all parameters as `get_nb_trainable_parameters` counts them."""
    from profiler import workload

    config = MODELS[model]
    request = parse_request({"model": {"config": config}, "method": method, **changes})
    with warnings.catch_warnings():
        # The stack's warnings are about code that is not ours.
        warnings.simplefilter("ignore")
        built = workload.meta_model(request, workload.model_config(config))
    trainable, total = built.get_nb_trainable_parameters()
    return trainable, total


def counted_here(method: Any, model: str, **changes: Any) -> tuple[int, int]:
    """Return the same two numbers of the analytic engine's model."""
    config = MODELS[model]
    request = parse_request({"model": {"config": config}, "method": method, **changes})
    spec = resolve(request, config, model).spec
    return spec.trainable_parameters(), spec.total_parameters()
