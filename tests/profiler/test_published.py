"""Dry runs against numbers that others measured or printed."""

from __future__ import annotations

import pytest

from profiler import trace
from tests.profiler.recipes import run, traced

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}
MISTRAL_7B = {
    **LLAMA_2_7B,
    "model_type": "mistral",
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "sliding_window": None,
}


def test_mistral_7b_needs_what_was_measured_on_an_a100() -> None:
    # foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv at commit
    # 876e2ed6: full fine-tuning, bf16, adamw_torch, 4 x 4096, checkpointing, flash attention 2;
    # torch.cuda.max_memory_allocated of the Trainer's memory probe.
    published = 72_434_837_504
    step = traced(
        MISTRAL_7B,
        micro_batch_size=4,
        seq_len=4096,
        optimizer="adamw_torch",
        activation_checkpointing="full",
        attention="flash_attention_2",
        hardware="a100-80gb",
    )
    assert trace.read(step).peak.allocated_bytes == pytest.approx(published, rel=0.005)


def test_adapters_count_as_peft_prints_them() -> None:
    # huggingface/peft README and docs, Llama-2-7B, r=8 on q_proj and v_proj:
    # "trainable params: 4,194,304 || all params: 6,742,609,920".
    method = {"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]}
    counted = run(LLAMA_2_7B, method=method).parameters
    assert (counted.trainable, counted.total) == (4_194_304, 6_742_609_920)


def test_4_bit_weights_take_the_bytes_that_their_paper_counts() -> None:
    # Dettmers et al. 2023, QLoRA, section 3: double quantization saves 0.373 bits a parameter,
    # from 0.5 to 0.127 bits for the scales.
    for double_quant, bits in ((False, 0.5), (True, 0.127)):
        step = traced(
            {**LLAMA_2_7B, "num_hidden_layers": 1},
            method="qlora",
            quantization={"name": "nf4", "double_quant": double_quant},
        )
        scales = sum(
            storage.bytes
            for storage in step.storages
            if storage.module.endswith(("weight.absmax", "weight.nested_absmax"))
        )
        packed = sum(
            storage.bytes
            for storage in step.storages
            if storage.dtype == "uint8" and storage.operator == "parameter"
        )
        assert 8 * scales / (2 * packed) == pytest.approx(bits, abs=0.0005)


def test_8_bit_states_take_one_byte_and_a_scale_for_256() -> None:
    # bitsandbytes/optim/optimizer.py at 0.50.2, Optimizer2State.init_state: two uint8 states, each
    # with one fp32 maximum for 256 elements; the Trainer keeps embeddings in 32 bits.
    step = traced({**LLAMA_2_7B, "num_hidden_layers": 1}, optimizer="adamw_8bit")
    states = sum(
        storage.bytes
        for storage in step.storages
        if storage.component == "optimizer_states" and storage.site == "head"
    )
    elements = 32_000 * 4096
    assert states == 2 * (elements + 4 * elements // 256)
    tables = [
        storage
        for storage in step.storages
        if storage.component == "optimizer_states" and storage.module == "model.embed_tokens.weight"
    ]
    assert [(table.bytes, table.dtype) for table in tables] == [(4 * elements, "float32")] * 2
