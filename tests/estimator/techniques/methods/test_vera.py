"""VeRA against PEFT: its vectors are trained, its matrices are buffers."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.request import parse_request
from estimator.resolve import resolve
from profiler import workload
from tests.conformance.cases import MODELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

KNOBS: tuple[dict[str, Any], ...] = (
    {},
    {"r": 24, "vera_dropout": 0.1},
    {"modules_to_save": ["lm_head"]},
)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("knobs", KNOBS, ids=["plain", "rank and dropout", "head saved"])
def test_parameters_and_shared_matrices_are_those_of_peft(
    knobs: dict[str, Any], family: str
) -> None:
    config = MODELS[family]
    request = parse_request({"model": {"config": config}, "method": {"name": "vera", **knobs}})
    spec = resolve(request, config, "model").spec
    model = workload.meta_model(request, workload.model_config(config))
    assert (spec.trainable_parameters(), spec.total_parameters()) == tuple(
        model.get_nb_trainable_parameters()
    )
    ours = {
        each.name: tuple(width.value for width in each.shape)
        for each in spec.buffers
        if each.name.startswith("vera_")
    }
    theirs = {
        name.split(".")[-2]: tuple(buffer.shape)
        for name, buffer in model.named_buffers()
        if ".vera_" in name
    }
    assert ours == theirs
