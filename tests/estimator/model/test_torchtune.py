"""torchtune's own model: what its documents print, and what is refused."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import UnsupportedCombinationError, UnsupportedModelError
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.resolve import resolve

LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"
LORA = {"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"], "adapter_dtype": "base"}


def _document(**fields):
    return {"model": LLAMA_2_7B, "method": LORA, "software": "torchtune", **fields}


def _run(**fields):
    request = parse_request(_document(**fields))
    return resolve(request, find_model(request.model, Access.CATALOGUE).config, request.model)


def test_parameters_are_those_that_the_tutorial_prints():
    # torchtune, docs/source/tutorials/lora_finetune.rst at 0914d5cfb: "6742609920 total params,
    # 4194304 trainable params".
    spec = _run().spec
    assert (spec.total_parameters(), spec.trainable_parameters()) == (6_742_609_920, 4_194_304)


def test_lora_over_4_x_2048_tokens_reserves_what_the_readme_prints():
    # torchtune, README.md at 0217d44c2: LoRA, Llama2-7B, batch 4, length 2048: 21.3 GB.
    document = _document(
        software={"framework": "torchtune", "version": "0.1"},
        micro_batch_size=4,
        seq_len=2048,
        gradient_accumulation_steps=64,
        activation_checkpointing="full",
        optimizer={"name": "adamw", "implementation": "foreach"},
    )
    config = find_model(LLAMA_2_7B, Access.CATALOGUE).config
    peak = answer(parse_request(document), config, LLAMA_2_7B, None).peak
    assert peak.reserved_bytes.expected == pytest.approx(21.3e9, rel=0.02)


def test_full_training_over_4_x_2048_tokens_allocates_what_was_posted():
    # torchtune #961, 10 May 2024: 7B_full_low_memory with batch_size=4 and every row filled up to
    # 2048 tokens: 20.2 peak memory allocated, which was printed in GB then.
    document = {
        "model": LLAMA_2_7B,
        "software": {"framework": "torchtune", "version": "0.1"},
        "optimizer": {"name": "paged_adamw_32bit", "in_backward": True},
        "micro_batch_size": 4,
        "seq_len": 2048,
        "activation_checkpointing": "full",
    }
    config = find_model(LLAMA_2_7B, Access.CATALOGUE).config
    peak = answer(parse_request(document), config, LLAMA_2_7B, None).peak
    assert peak.allocated_bytes.expected == pytest.approx(20.2e9, rel=0.0025)


def test_a_framework_without_a_version_means_its_newest():
    assert parse_request(_document()).software.version == "0.6"


def test_adapters_and_packed_weights_are_torchtunes_where_nothing_is_said():
    request = parse_request(_document(method={"name": "qlora", "target_modules": ["q_proj"]}))
    assert request.method.adapter_dtype == "base"
    assert request.quantization.prepare_kbit is False


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": "eager"}, "attention 'eager'"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"padding": True}, "padding"),
        ({"packing": True}, "packing"),
        ({"activation_checkpointing": "offload"}, "activation checkpointing 'offload'"),
        ({"loss": "chunked"}, "loss 'chunked'"),
        ({"kernels": ["liger"], "loss": "standard"}, "kernels"),
        ({"method": "ia3"}, "method 'ia3'"),
        ({"method": {**LORA, "use_dora": True}}, "use_dora"),
        ({"method": {**LORA, "modules_to_save": ["output"]}}, "modules_to_save"),
        ({"method": {**LORA, "adapter_dtype": "float32"}}, "adapter_dtype 'float32'"),
        ({"quantization": {"name": "nf4", "prepare_kbit": True}}, "prepare_kbit"),
        ({"quantization": {"name": "fp4", "prepare_kbit": False}}, "quantization 'fp4'"),
        ({"quantization": {"name": "int8", "prepare_kbit": False}}, "quantization 'int8'"),
        (
            {"quantization": {"name": "nf4", "double_quant": False, "prepare_kbit": False}},
            "nf4 with double_quant",
        ),
    ],
)
def test_what_its_code_is_not_described_for_is_refused_by_name(fields, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _run(**fields)


def test_an_adapter_on_a_head_that_runs_in_chunks_is_refused():
    method = {**LORA, "target_modules": ["q_proj", "output"]}
    document = parse_request(_document(method=method))
    config = find_model(LLAMA_2_7B, Access.CATALOGUE).config
    with pytest.raises(UnsupportedCombinationError, match="an adapter on the head"):
        answer(document, config, LLAMA_2_7B, None)


@pytest.mark.parametrize(
    ("model", "version", "said"),
    [
        ("gpt2", "0.6", "llama and mistral without biases, not for 'gpt2'"),
        ("meta-llama/Llama-3.2-1B", "0.3", "for torchtune 0.6 only"),
    ],
)
def test_a_model_that_is_not_described_is_refused_by_name(model, version, said):
    software = {"framework": "torchtune", "version": version}
    with pytest.raises(UnsupportedModelError, match=said):
        _run(model=model, software=software)


def test_tables_of_positions_are_one_for_each_layer_with_adapters():
    # Measured by the dry runs of data/measurements/torchtune.json; the tables of 4096 positions.
    assert len(_run().spec.buffers) == 2 * 32
    assert len(_run(method="full").spec.buffers) == 2
    tied = _run(model="meta-llama/Llama-3.2-1B").spec
    assert (len(tied.buffers), tied.tied) == (2, True)
