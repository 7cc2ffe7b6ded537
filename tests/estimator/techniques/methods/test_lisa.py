"""LISA: what is trained and kept, against transformers' parameters and torch's own states."""

from __future__ import annotations

from itertools import combinations
from typing import Any
from unittest import mock

import pytest

from estimator.calibration import device_constants
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.pipeline import Engine
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from estimator.techniques.method import by_layer
from estimator.techniques.methods import lisa
from estimator.traits import traits
from tests.conformance.cases import MODELS
from tests.estimator.techniques.optimizers.real import TOY, toy_model

LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma3": "model.layers"}


@pytest.mark.parametrize("family", list(LAYERS))
def test_what_is_trained_is_all_but_the_layers_and_two_of_them(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(MODELS[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    layers = model.get_submodule(LAYERS[family])
    layers.requires_grad_(False)
    layers[-2:].requires_grad_(True)
    counted = sum(each.numel() for each in model.parameters() if each.requires_grad)
    request = parse_request({"model": {"config": MODELS[family]}, "method": "lisa"})
    assert resolve(request, MODELS[family], family).spec.trainable_parameters() == counted


@pytest.mark.parametrize("keep_states", [True, False])
def test_states_are_those_of_every_layer_that_had_its_turn(keep_states: bool) -> None:
    import torch

    model = toy_model("bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.zeros((1, 4), dtype=torch.int64)
    for turn in (0, 1) if keep_states else (1,):
        model.model.layers.requires_grad_(False)
        model.model.layers[turn].requires_grad_(True)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    method = {"name": "lisa", "activated_layers": 1, "keep_states": keep_states}
    request = {"model": {"config": TOY}, "method": method, "seq_len": 1}
    result = estimate({**request, "optimizer": {"name": "adamw", "implementation": "single"}})
    states = [
        row.bytes
        for part in result.breakdown
        if part.component == "optimizer_states"
        for row in part.rows
        if "temporaries" not in row.name
    ]
    assert sum(states) == kept


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_other_draw_needs_more(optimizer: str, checkpointing: str) -> None:
    config = MODELS["llama"]
    document: dict[str, Any] = {
        "model": {"config": config}, "method": "lisa", "optimizer": optimizer,
        "activation_checkpointing": checkpointing,
    }  # fmt: skip
    request = parse_request(document)

    def peak(draw: tuple[int, ...]) -> int:
        def drawn(spec: Any, _: Any, change: Any) -> Any:
            return by_layer(spec, lambda index: index in draw, change)

        with mock.patch.object(lisa, "by_layer", drawn):
            run = resolve(request, config, "llama")
        engine = Engine(run, {}, traits(request, run.spec.total_parameters()))
        return engine.read(2, 700, device_constants("8.0")).allocated

    peaks = {draw: peak(draw) for draw in combinations(range(5), 2)}
    assert max(peaks.values()) == peaks[3, 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "galore_adamw"}, "galore_adamw"),
        ({"optimizer": {"name": "adamw", "in_backward": True}}, "in backward"),
        ({"precision": "master_bf16"}, "master_bf16"),
    ],
)
def test_what_was_not_compared_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match=said):
        estimate({"model": "meta-llama/Llama-3.1-8B", "method": "lisa", **changes})


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="has 32 layers"):
        estimate(
            {
                "model": "meta-llama/Llama-3.1-8B",
                "method": {"name": "lisa", "activated_layers": 33},
            }
        )
