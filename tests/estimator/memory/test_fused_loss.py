"""Losses without logits, against what their authors print."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.eager.size import dim, powers
from estimator.eager.tensor import Regime
from estimator.errors import UnsupportedCombinationError
from estimator.memory.chunked_loss import ChunkedHead
from estimator.memory.fused_loss import FusedLinear
from estimator.memory.trace import trace
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.result import Result

# google/gemma-2-2b-it, config.json.
GEMMA_2_2B: dict[str, Any] = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 256_000, "sliding_window": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "vocab_size": 500,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000,
}  # fmt: skip


def _answer(config: dict[str, Any], **recipe: Any) -> Result:
    request = parse_request({"model": {"config": config}, "attention": "eager", **recipe})
    return answer(request, config, "model", None)


def _backward_of_the_loss(config: dict[str, Any], tokens: tuple[int, int], **recipe: Any) -> int:
    """Return the most that tensors of the loss and the head's gradient take in its backward."""
    request = parse_request({"model": {"config": config}, "attention": "eager", **recipe})
    seen = trace(resolve(request, config, "model"), Regime())
    site, at = seen.sites.index("loss"), powers(*tokens)
    return max(
        sum(
            coefficient * at[monomial] * count
            for kind, count in instant.live.items()
            for coefficient, monomial in [seen.kinds[kind].size]
            if seen.kinds[kind].site == site
        )
        for where, instants in seen.backward
        if where == site
        for instant in instants
    )


def test_a_chunk_has_the_rows_that_the_comment_in_liger_works_out():
    # ops/fused_linear_cross_entropy.py: "for ex: BT = 4096*4, V = 32000, H = 4096 ==>
    # inc_factor = 8, chunk_size = 2048".
    class Spec:
        vocab, hidden = dim("V", 32_000), dim("h", 4096)

    assert FusedLinear().rows(Spec, 4096 * 4) == 2048  # type: ignore[arg-type]


def test_a_batch_below_one_chunk_is_a_single_chunk():
    class Spec:
        vocab, hidden = dim("V", 1000), dim("h", 4096)

    assert FusedLinear().rows(Spec, 100) is None  # type: ignore[arg-type]


def test_cut_cross_entropy_costs_gemma_2_what_its_paper_says():
    # README of apple/ml-cross-entropy, "Benchmarking", which is table 1 of arXiv:2411.09009:
    # loss-bw 1163.0, loss-fw-bw 1164.0 (MiB; 8192 tokens of Gemma 2 2B on an A100).
    found = _backward_of_the_loss(GEMMA_2_2B, (8, 1024), loss="cut_cross_entropy")
    assert 1163 <= found / 2**20 <= 1164


@pytest.mark.parametrize("loss", ["fused_linear", "cut_cross_entropy", "chunked"])
def test_a_frozen_head_gets_no_gradient(loss):
    frozen = _answer(LLAMA, loss=loss, method="lora", activation_checkpointing="full")
    rows = [row for part in frozen.breakdown for row in part.rows]
    assert not any("lm_head.weight.grad" in row.name for row in rows)


def test_cut_cross_entropy_refuses_fp32_hidden_states():
    with pytest.raises(UnsupportedCombinationError, match="takes bf16 and fp16"):
        _answer(LLAMA, loss="cut_cross_entropy", precision="amp_bf16")


def test_liger_refuses_a_model_that_it_does_not_patch():
    with pytest.raises(UnsupportedCombinationError, match="Liger has no loss"):
        _answer(GPT2, loss="fused_linear", seq_len=32)


@pytest.mark.parametrize("loss", ["fused_linear", "cut_cross_entropy", "chunked"])
def test_a_fused_loss_refuses_an_adapter_on_the_head(loss):
    adapted = {"name": "lora", "target_modules": ["lm_head", "q_proj"]}
    with pytest.raises(UnsupportedCombinationError, match="but its weight"):
        _answer(LLAMA, loss=loss, method=adapted)


def test_the_tile_of_trl_has_the_size_that_its_source_names():
    # trl/kernels/chunked_logprob.py, TOKEN_CHUNK_SIZE = 4096; trl/trainer/utils.py,
    # _CHUNKED_LOGPROB_CHUNK_SIZE = 32768: 256 MiB in bf16, for any longer batch.
    seen = trace(
        resolve(parse_request({"model": {"config": LLAMA}, "loss": "chunked"}), LLAMA, "model"),
        Regime(loss_rows=ChunkedHead().rows(None, 8192)),  # type: ignore[arg-type]
    )
    tiles = [kind for kind in seen.kinds if kind.name == "loss.tile of logits"]
    assert [kind.size for kind in tiles] == [(256 * 2**20, 0)]
