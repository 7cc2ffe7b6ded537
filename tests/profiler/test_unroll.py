"""A trace of a few layers, written out, is the trace of all layers."""

from __future__ import annotations

from typing import Any

import pytest

from profiler.trace import Event, Storage, Trace
from profiler.unroll import NotPeriodicError, Shortening, unroll
from tests.profiler.recipes import TINY, traced

# One layer more than is traced, for a stack of one kind of layers.
SIX = {**TINY, "num_hidden_layers": 6}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full, foreach, tied head": (
        {**SIX, "tie_word_embeddings": True},
        {"optimizer": "adamw_torch"},
    ),
    "autocast, checkpointing, master copies": (
        SIX,
        {"precision": "master_bf16", "autocast": "bf16", "activation_checkpointing": "full"},
    ),
    "qlora, dropout, padding, paged states": (
        SIX,
        {
            "method": {"name": "qlora", "r": 4, "lora_dropout": 0.1},
            "autocast": "bf16",
            "padding": True,
            "optimizer": "paged_adamw_8bit",
        },
    ),
    "accumulation, adafactor": (
        SIX,
        {"gradient_accumulation_steps": 3, "optimizer": "adafactor"},
    ),
    "gpt2": ({"model_type": "gpt2", "n_embd": 64, "n_layer": 6, "n_head": 4}, {"seq_len": 65}),
    "two kinds of layers": (
        {**TINY, "model_type": "gemma2", "head_dim": 16, "num_hidden_layers": 10},
        {"seq_len": 33},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_written_out_trace_is_the_full_trace_event_by_event(case: str) -> None:
    config, fields = CASES[case]
    short = traced(config, **fields)
    full = traced(config, every_layer=True, **fields)
    assert short.storages == full.storages
    assert short.events == full.events
    assert short.steady_from == full.steady_from


def _storage(layer: int | None, size: int) -> Storage:
    return Storage(
        bytes=size,
        dtype="uint8",
        shape=(size,),
        component="activations",
        phase="forward",
        module="layers.*",
        layer=layer,
        operator="aten.mm",
        site="layer",
    )


def test_layers_that_do_different_work_are_not_written_out() -> None:
    sizes = (10, 10, 10, 11, 10)
    storages = tuple(_storage(layer, size) for layer, size in enumerate(sizes))
    births = tuple(Event(layer, True, "forward", layer) for layer in range(len(sizes)))
    with pytest.raises(NotPeriodicError, match="different work"):
        unroll(Trace(storages, births, 0), Shortening.of(20, period=1))


def test_a_pass_that_leaves_out_layers_is_not_written_out() -> None:
    storages = tuple(_storage(layer, 10) for layer in (1, 2))
    births = tuple(Event(index, True, "forward", index + 1) for index in range(2))
    with pytest.raises(NotPeriodicError, match="leaves some of them out"):
        unroll(Trace(storages, births, 0), Shortening.of(20, period=1))
