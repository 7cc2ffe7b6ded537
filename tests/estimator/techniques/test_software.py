"""What the version of transformers changes."""

from __future__ import annotations

import pytest

from estimator.service import estimate

VOCAB, TOKENS = 32_000, 2 * 512
TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
}

# Bytes for each token and entry of the vocabulary, at the highest moment of the loss. Read off the
# live storages of the real LlamaForCausalLM of this shape in bf16, batch 2 x 512, outputs dropped
# before backward: transformers 4.45.2, 4.48.1 and 5.23.0 on torch 2.13.0, CPU.
OBSERVED = [("4.45", 12.009, 12.000), ("4", 14.009, 12.000), ("5", 10.025, 12.024)]


@pytest.mark.parametrize(("version", "forward", "backward"), OBSERVED)
def test_the_copies_of_the_logits_are_those_that_the_version_keeps(version, forward, backward):
    result = estimate(
        {
            "model": {"config": TINY},
            "method": {"name": "lora", "r": 1, "target_modules": ["q_proj"]},
            "micro_batch_size": 2,
            "seq_len": 512,
            "software": {"version": version},
        }
    )
    found = {
        each.moment: each.components["activations"] / (TOKENS * VOCAB)
        for each in result.timeline
        if each.moment in ("loss forward", "loss backward")
    }
    assert found["loss forward"] == pytest.approx(forward, rel=0.01)
    assert found["loss backward"] == pytest.approx(backward, rel=0.01)


def test_the_answer_names_what_older_versions_do_differently_and_is_not_counted():
    result = estimate({"model": "meta-llama/Llama-2-7b-hf", "software": {"version": "4.45"}})
    assert any("rotary tables" in each for each in result.not_modelled)


def test_checkpointing_is_reentrant_by_default_in_version_4_only():
    asked = {"model": "meta-llama/Llama-2-7b-hf", "micro_batch_size": 4}

    def peaks(version: str, kind: str) -> list[int]:
        software = {"software": {"version": version}}
        result = estimate({**asked, **software, "activation_checkpointing": kind})
        return [each.bytes for each in result.timeline]

    assert peaks("4", "full") == peaks("4", "full_reentrant")
    assert peaks("5", "full") == peaks("5", "full_nonreentrant")
    assert peaks("4", "full") != peaks("4", "full_nonreentrant")


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj"], ["k_proj"]])
def test_adapters_beside_some_of_query_key_and_value_are_answered(targets, attention, padding):
    result = estimate(
        {
            "model": "meta-llama/Llama-2-7b-hf",
            "method": {"name": "lora", "r": 8, "target_modules": targets},
            "attention": attention,
            "padding": padding,
        }
    )
    assert result.peak.allocated_bytes.expected > 2 * 6_738_415_616


def _after_forward(version: str, **settings: str) -> int:
    request = {"model": "meta-llama/Llama-3.1-8B", "seq_len": 1024, **settings}
    timeline = estimate({**request, "software": {"version": version}}).timeline
    return next(each.bytes for each in timeline if each.moment == "forward: final_norm")


# transformers 4.48.1, integrations/sdpa_attention.py, writes keys and values out for all 32 heads
# where 4.54.0 hands 8 to SDPA: 24 heads more of width 128, two tensors, two bytes, 1024 tokens.
REPEATED = 32 * (24 * 128 * 2 * 2 * 1024)


@pytest.mark.parametrize("version", ["4", "4.45"])
def test_older_versions_keep_keys_and_values_of_every_query_head_for_sdpa(version):
    assert _after_forward(version) - _after_forward("5") == REPEATED


@pytest.mark.parametrize("version", ["4", "4.45"])
def test_flash_attention_takes_grouped_heads_in_every_version(version):
    settings = {"attention": "flash_attention_2"}
    assert _after_forward(version, **settings) == _after_forward("5", **settings)
