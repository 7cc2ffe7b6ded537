"""What the allocator holds in the replay of the formula and in that of the dry run."""

from __future__ import annotations

from typing import Any, Final

import pytest

from estimator.memory.caching_allocator import LARGE_SEGMENT_BYTES
from estimator.pipeline import answer
from estimator.request import parse_request
from profiler import engine, trace

LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 16000,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
FULL: Final[dict[str, Any]] = {"micro_batch_size": 2, "seq_len": 384}
FUSED: Final = {"name": "adamw", "implementation": "fused"}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param({"precision": "bf16", "optimizer": FUSED}, id="bf16"),
        pytest.param({"precision": "master_bf16", "optimizer": FUSED}, id="fp32 copies"),
        pytest.param({"precision": "megatron_bf16", "optimizer": FUSED}, id="fp32 gradients too"),
        pytest.param(
            {"precision": "fp32", "optimizer": "adafactor", "gradient_accumulation_steps": 4},
            id="several micro-batches",
        ),
        pytest.param(
            {"precision": "fp32", "optimizer": {"name": "lowmem_adafactor"}},
            id="temporaries of one tensor after the other",
        ),
        pytest.param(
            {
                "precision": "bf16", "method": {"name": "lora", "r": 16}, "optimizer": FUSED,
                "activation_checkpointing": "full",
            },
            id="lora checkpointed",
        ),
    ],
)  # fmt: skip
def test_both_replays_hold_as_much_to_within_a_segment(recipe: dict[str, Any]):
    request = parse_request({"model": {"config": LLAMA}, **FULL, **recipe})
    reading = trace.read(engine.trace(request, LLAMA))
    found = answer(request, LLAMA, "model", None)
    assert found.peak.reserved_bytes.expected == pytest.approx(
        reading.reserved_bytes, abs=LARGE_SEGMENT_BYTES
    )
