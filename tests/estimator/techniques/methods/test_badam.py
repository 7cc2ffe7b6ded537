"""BAdam: what it trains and keeps, against badam's own optimizer on a real model."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.calibration import device_constants
from estimator.errors import UnsupportedCombinationError
from estimator.pipeline import Engine
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from estimator.techniques.method import by_layer
from estimator.techniques.methods import badam
from estimator.traits import traits
from tests.conformance.cases import MODELS
from tests.estimator.techniques.optimizers.real import TOY, toy_model


def _blocks(model: Any, optimizer: Any, **settings: Any) -> Any:
    from badam import BlockOptimizer

    names = list(model.named_parameters())
    return BlockOptimizer(optimizer, names, switch_mode="ascending", **settings)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_what_is_trained_is_what_badam_leaves_trainable(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**MODELS[family], "num_hidden_layers": 3, "vocab_size": 128, "layer_types": None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.bfloat16
        )
    _blocks(model, torch.optim.AdamW(model.parameters()))
    counted = sum(each.numel() for each in model.parameters() if each.requires_grad)
    request = parse_request({"model": {"config": MODELS[family]}, "method": "badam"})
    assert resolve(request, MODELS[family], family).spec.trainable_parameters() == counted


def test_copies_and_states_are_those_of_one_layer_however_many_had_their_turn() -> None:
    import torch

    model = toy_model("bf16")
    optimizer = _blocks(model, torch.optim.AdamW(model.parameters()), switch_block_every=2)
    ids = torch.zeros((1, 4), dtype=torch.int64)
    # Behind the first step the second layer has its turn; the second step fills its states.
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = sum(
        value.nbytes
        for state in optimizer.base_optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    copies = sum(copy.nbytes for copy in optimizer.param_idx2hp.values())
    request = {"model": {"config": TOY}, "method": "badam", "seq_len": 1}
    result = estimate({**request, "optimizer": {"name": "adamw", "implementation": "single"}})
    kept = [
        row.bytes
        for part in result.breakdown
        if part.component == "optimizer_states"
        for row in part.rows
        if "temporaries" not in row.name
    ]
    assert sum(kept) == states + copies


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_turn_of_no_other_layer_needs_more(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODELS["llama"]
    document = {
        "model": {"config": config}, "method": "badam", "activation_checkpointing": checkpointing,
    }  # fmt: skip
    request = parse_request(document)

    def peak(turn: int) -> int:
        def taken(spec: Any, _: Any, change: Any) -> Any:
            return by_layer(spec, lambda index: index == turn, change)

        monkeypatch.setattr(badam, "by_layer", taken)
        run = resolve(request, config, "llama")
        engine = Engine(run, {}, traits(request, run.spec.total_parameters()))
        return engine.read(2, 700, device_constants("8.0")).allocated

    peaks = [peak(turn) for turn in range(5)]
    assert max(peaks) == peaks[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "gpt2"}, "transformer.h"),
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "master_bf16"}, "master_bf16"),
        ({"optimizer": "adamw_8bit"}, "adamw_8bit"),
        ({"method": "badam_ratio"}, "ratio mode"),
    ],
)
def test_what_was_not_compared_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    document = {"model": "meta-llama/Llama-3.1-8B", "method": "badam", **changes}
    with pytest.raises(UnsupportedCombinationError, match=said):
        estimate(document)
