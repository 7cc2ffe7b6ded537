"""Bytes that a traced step keeps for backward, against closed forms that somebody else derived.

They were derived by hand from the operators' derivatives and agree with another tracker of live
storages. Symbols: h hidden, a and k width of queries and keys, f of the MLP, H heads.
"""

from __future__ import annotations

from typing import Any

import pytest

from profiler import trace
from tests.profiler.recipes import LLAMA, at_end_of_forward, live_at, traced

TOKENS = 512
LAYERS: int = LLAMA["num_hidden_layers"]
VOCAB: int = LLAMA["vocab_size"]
HIDDEN: int = LLAMA["hidden_size"]
# Two tiny tensors with the state of the random generator, kept by every flash attention.
RNG_STATE = "uint64"


def per_token_and_layer(storages: list[trace.Storage]) -> float:
    """Return the activations that a layer in the middle keeps for each token [bytes]."""
    middle = [
        storage.bytes
        for storage in storages
        if storage.layer == LAYERS // 2
        and storage.component == "activations"
        and storage.dtype != RNG_STATE
        and not _is_adapter_copy(storage)
    ]
    return sum(middle) / TOKENS


def _is_adapter_copy(storage: trace.Storage) -> bool:
    """Whether this is autocast's 16-bit copy of an adapter's weight, which no token pays for."""
    return ".lora_" in storage.module and TOKENS not in storage.shape


@pytest.mark.parametrize(
    ("fields", "bytes_per_token"),
    [
        ({}, 16 * 1024 + 8 * 1024 + 8 * 2816 + 4 * 16 + 8),  # 16h + 4a + 4k + 8f + 4H + 8
        ({"precision": "fp32"}, 24 * 1024 + 16 * 1024 + 16 * 2816 + 4 * 16 + 8),
        ({"activation_checkpointing": "full"}, 2 * 1024),  # the layer's input
        ({"activation_checkpointing": "full", "precision": "fp32"}, 4 * 1024),
    ],
    ids=["bf16", "fp32", "bf16 checkpointed", "fp32 checkpointed"],
)
def test_a_layer_keeps_what_the_closed_form_says(
    fields: dict[str, Any], bytes_per_token: int
) -> None:
    kept = per_token_and_layer(at_end_of_forward(traced(LLAMA, **fields)))
    assert kept == bytes_per_token


def test_a_layer_of_llama_3_1_8b_keeps_200840_bytes_for_each_token() -> None:
    config = {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    assert per_token_and_layer(at_end_of_forward(traced(config))) == 200_840


def test_autocast_keeps_a_16_bit_copy_of_every_linear_weight() -> None:
    alive = at_end_of_forward(traced(LLAMA, precision="amp_bf16"))
    linear = LAYERS * (4 * 1024 * 1024 + 3 * 1024 * 2816) + VOCAB * 1024
    copies = [
        storage.bytes
        for storage in alive
        if storage.component == "activations" and storage.shape[-2:] in _weight_shapes()
    ]
    assert sum(copies) == 2 * linear
    # 26h + 4a + 4k + 8f + 4H + 8: q, k and v each cast the same input, and so do gate and up.
    weights = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
    kept = per_token_and_layer(alive) - weights / TOKENS
    assert kept == 26 * 1024 + 8 * 1024 + 8 * 2816 + 4 * 16 + 8


def _weight_shapes() -> set[tuple[int, ...]]:
    return {(1024, 1024), (2816, 1024), (1024, 2816), (VOCAB, 1024)}


@pytest.mark.parametrize(
    ("method", "hidden_units"),
    [
        ({"name": "lora", "r": 16}, 68.0),
        ({"name": "lora", "r": 16, "adapter_dtype": "base"}, 42.3),
        ({"name": "lora", "r": 16, "adapter_dtype": "base", "lora_dropout": 0.1}, 59.0),
    ],
    ids=["fp32 adapters", "bf16 adapters", "bf16 adapters, dropout"],
)
def test_adapters_on_all_linear_layers_keep_what_was_measured(
    method: dict[str, Any], hidden_units: float
) -> None:
    kept = per_token_and_layer(at_end_of_forward(traced(LLAMA, method=method)))
    assert kept / HIDDEN == pytest.approx(hidden_units, abs=0.05)


def test_4_bit_base_weights_with_preparation_keep_what_was_measured() -> None:
    method = {"name": "qlora", "r": 16, "lora_dropout": 0.05}
    kept = per_token_and_layer(at_end_of_forward(traced(LLAMA, method=method, autocast="bf16")))
    assert kept / HIDDEN == pytest.approx(75.5, abs=0.05)


def vocabulary_bytes(storages: list[trace.Storage]) -> float:
    """Return the bytes of everything as wide as the vocabulary, for each logit."""
    wide = [
        storage.bytes
        for storage in storages
        if storage.component == "activations"
        and storage.shape[-1:] == (VOCAB,)
        and TOKENS in storage.shape
    ]
    return sum(wide) / (TOKENS * VOCAB)


@pytest.mark.parametrize(
    ("phase", "fields", "bytes_per_logit"),
    [
        (trace.LOSS_FORWARD, {}, 10),
        (trace.LOSS_BACKWARD, {}, 12),
        (trace.LOSS_BACKWARD, {"loop": {"keep_outputs": True}}, 14),
        (trace.LOSS_FORWARD, {"precision": "fp32"}, 8),
    ],
    ids=["forward", "backward", "backward, outputs kept", "forward fp32"],
)
def test_the_loss_peaks_at_the_measured_bytes_for_each_logit(
    phase: str, fields: dict[str, Any], bytes_per_logit: int
) -> None:
    assert vocabulary_bytes(live_at(traced(LLAMA, **fields), phase)) == bytes_per_logit


@pytest.mark.parametrize(("tied", "copies"), [(False, 2), (True, 3)])
def test_gradients_of_a_tied_table_peak_at_three_copies(tied: bool, copies: int) -> None:
    step = traced({**LLAMA, "tie_word_embeddings": tied})
    live = most = 0
    for event in step.events[step.steady_from :]:
        storage = step.storages[event.storage]
        if storage.component == "gradients" and storage.shape == (VOCAB, HIDDEN):
            live += 1 if event.is_alloc else -1
            most = max(most, live)
    assert most == copies


@pytest.mark.parametrize(
    ("implementation", "largest_tensors", "whole_models"),
    [("foreach", 0, 1), ("fused", 0, 0), ("single", 2, 0)],
)
def test_the_update_takes_what_was_measured_beside_the_states(
    implementation: str, largest_tensors: int, whole_models: int
) -> None:
    step = traced(LLAMA, optimizer={"name": "adamw", "implementation": implementation})
    alive = live_at(step, trace.OPTIMIZER_STEP)
    taken = sum(
        storage.bytes
        for storage in alive
        if storage.component == "workspace" and storage.site != "process"
    )
    matrices = sum(
        storage.bytes
        for storage in alive
        if storage.component == "weights" and len(storage.shape) == 2
    )
    # The vectors are a group of their own, updated after the matrices are done; and one at a time,
    # the last temporary of the tensor before is still there.
    expected = whole_models * matrices + largest_tensors * 2 * VOCAB * HIDDEN
    assert taken == pytest.approx(expected, rel=0.05 if implementation == "single" else 0)


def test_padding_keeps_a_float_mask_in_every_layer_and_repeats_keys_and_values() -> None:
    config = {**LLAMA, "num_key_value_heads": 4}
    masks = [
        storage
        for storage in at_end_of_forward(traced(config, padding=True))
        if storage.shape[-2:] == (TOKENS, TOKENS)
    ]
    assert [storage.dtype for storage in masks] == ["bfloat16"] * LAYERS
    # 2 S^2 for each layer, and 4 (a - k) more for each token.
    plain = per_token_and_layer(at_end_of_forward(traced(config)))
    padded = per_token_and_layer(at_end_of_forward(traced(config, padding=True)))
    assert padded - plain == 2 * TOKENS + 4 * (1024 - 256)


def test_eager_attention_keeps_six_bytes_for_each_score() -> None:
    plain = per_token_and_layer(at_end_of_forward(traced(LLAMA)))
    eager = per_token_and_layer(at_end_of_forward(traced(LLAMA, attention="eager")))
    scores = 6 * 16 * TOKENS
    # Flash attention's out and logsumexp are gone; eager's output is kept by the projection.
    assert eager - plain == pytest.approx(scores, rel=0.05)


def test_the_flash_attn_package_keeps_what_torchs_flash_attention_keeps() -> None:
    plain = per_token_and_layer(at_end_of_forward(traced(LLAMA)))
    package = traced(LLAMA, attention="flash_attention_2")
    assert per_token_and_layer(at_end_of_forward(package)) == pytest.approx(plain, abs=1)
