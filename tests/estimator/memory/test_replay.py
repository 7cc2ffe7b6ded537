"""The replay of a run: what it costs is paid once for each micro-batch and length."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from estimator import pipeline
from estimator.eager.size import powers
from estimator.memory.caching_allocator import AllocatorSettings
from estimator.memory.recordings import Recordings
from estimator.memory.replay import Blocks, Conditions, Turn, blocks
from estimator.request import parse_request
from estimator.service import estimate
from estimator.units import MiB

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip


def test_requests_of_one_recipe_that_take_turns_are_replayed_once_each(monkeypatch):
    replayed: list[int] = []

    def counted(*args: Any, **more: Any) -> Blocks:
        replayed.append(len(replayed))
        return blocks(*args, **more)

    monkeypatch.setattr(pipeline, "blocks", counted)
    request = parse_request({"model": {"config": LLAMA}, "hardware": {"memory_bytes": 2**30}})
    three = [structs.replace(request, seq_len=length) for length in (100, 200, 300)]
    first = [estimate(each).peak for each in three]
    once = len(replayed)
    again = [estimate(each).peak for each in three]
    assert again == first
    assert len(replayed) == once


REQUEST = {"model": {"config": LLAMA}, "seq_len": 700, "hardware": {"memory_bytes": 2**30}}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.999, 1.0, 1.5])
def test_a_card_decides_only_between_what_is_asked_for_and_what_would_be_held(share):
    """In between the allocator gives blocks back, as it does on a card of that size."""
    request = parse_request(REQUEST)
    engine = pipeline.engine_for(request, LLAMA, "llama")
    numbers = engine.numbers(1, 700)
    turn, recordings = Turn(engine._regime_of(numbers), powers(*numbers)), Recordings(engine.run)
    room = blocks(recordings, turn, 8 * MiB, None)
    assert room.requested < room.reserved
    capacity = room.requested + round(share * (room.reserved - room.requested))
    found = blocks(recordings, turn, 8 * MiB, capacity)
    assert found.reserved <= capacity or found == structs.replace(room, fits=False)
    if share >= 1:
        assert found == room
    assert blocks(recordings, turn, 8 * MiB, room.requested - 1) == structs.replace(
        room, fits=False
    )
    expandable = Conditions(AllocatorSettings(expandable_segments=True))
    pages = blocks(recordings, turn, 8 * MiB, capacity, expandable)
    assert pages.requested == room.requested
