"""A first batch of another length: the replay beside the real step on fake tensors."""

from __future__ import annotations

import pytest
from msgspec import structs

from estimator.memory import recordings
from estimator.pipeline import device_of, engine_for
from estimator.request import parse_request
from estimator.service import requested_gpu
from profiler import engine as dry_run
from profiler import trace, workload

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}
RECIPES = {
    "full": {},
    "full, checkpointed": {"activation_checkpointing": "full"},
    "full, amp": {"precision": "amp_bf16"},
    "lora": {"method": "lora"},
    "lora, checkpointed": {"method": "lora", "activation_checkpointing": "full"},
    "qlora": {"method": "qlora", "activation_checkpointing": "full"},
}


def _shorter_first(monkeypatch, length):
    """Have the first step of a dry run run over batches of another length."""
    whole, made = workload.batch, []

    def batch(request, device):
        made.append(request)
        if len(made) <= request.gradient_accumulation_steps:
            request = structs.replace(request, seq_len=length)
        return whole(request, device)

    monkeypatch.setattr(workload, "batch", batch)


def _without_loading(monkeypatch):
    """Have a replay begin with the model as it stays; a dry run does not see how it was made."""
    whole = recordings.loading

    def loading(run):
        events = whole(run)
        gone = {event.serial for event in events if event.size is None}
        return [event for event in events if event.serial >= 0 and event.serial not in gone]

    monkeypatch.setattr(recordings, "loading", loading)


@pytest.mark.parametrize("first", [256, 768, 1023])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_held_and_needed_after_a_shorter_first_batch(monkeypatch, recipe, first):
    asked = {"model": {"config": CONFIG}, "micro_batch_size": 4, "seq_len": 1024}
    request = parse_request(asked | recipe)
    engine = engine_for(request, CONFIG, "a llama of four layers")
    device = device_of(requested_gpu(request), request)
    _without_loading(monkeypatch)
    replayed = engine.blocks_under(4, 1024, device, earlier=(first,))
    _shorter_first(monkeypatch, first)
    reading = trace.read(dry_run.trace(request, CONFIG, every_layer=True))
    assert replayed.reserved == pytest.approx(reading.reserved_bytes, rel=0.01)
    assert replayed.pinned == pytest.approx(reading.pinned_bytes, rel=0.01)
