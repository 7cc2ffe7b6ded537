"""The replay of a run: what it costs is paid once for each micro-batch and length."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from estimator import pipeline
from estimator.memory.replay import Blocks, blocks
from estimator.request import parse_request
from estimator.service import estimate

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip


def test_requests_of_one_recipe_that_take_turns_are_replayed_once_each(monkeypatch):
    replayed: list[int] = []

    def counted(*args: Any) -> Blocks:
        replayed.append(len(replayed))
        return blocks(*args)

    monkeypatch.setattr(pipeline, "blocks", counted)
    request = parse_request({"model": {"config": LLAMA}, "hardware": {"memory_bytes": 2**30}})
    three = [structs.replace(request, seq_len=length) for length in (100, 200, 300)]
    first = [estimate(each).peak for each in three]
    assert len(replayed) == 3
    again = [estimate(each).peak for each in three]
    assert again == first
    assert len(replayed) == 3
