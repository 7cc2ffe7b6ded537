"""Unsloth's kernels: where they are refused, how its loss is cut, and what an MLP saves."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import UnsupportedCombinationError
from estimator.memory.unsloth_loss import UnslothLoss
from estimator.model.config import Config
from estimator.model.families.llama import read
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate

LLAMA = "meta-llama/Llama-2-7b-hf"
LORA = {"name": "lora", "r": 16, "lora_dropout": 0.0}
KERNELS = {"model": LLAMA, "kernels": ["unsloth"], "method": LORA, "autocast": "bf16"}
NF4 = {"name": "nf4", "prepare_kbit": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "full"},
        {"method": {**LORA, "lora_dropout": 0.1}},
        {"method": {**LORA, "target_modules": ["q_proj", "v_proj"]}},
        {"method": {**LORA, "use_dora": True}},
        {"method": {**LORA, "adapter_dtype": "bfloat16"}},
        {"model": "mistralai/Mistral-7B-v0.1"},
        {"model": "Qwen/Qwen2-7B"},
        {"quantization": "int8"},
        {"quantization": "nf4"},
        {"autocast": "fp16"},
        {"precision": "fp32"},
        {"padding": True},
        {"attention": "eager"},
        {"loss": "cut_cross_entropy"},
        {"software": {"version": "4"}},
        {"kernels": ["unsloth", "liger"], "loss": "standard"},
        {"kernels": ["unsloth", "compile"]},
        {"activation_checkpointing": "full_offload"},
        {"activation_checkpointing": "selective_op"},
        {"activation_checkpointing": "every_2"},
        {"optimizer": {"name": "adamw_torch", "in_backward": True}},
    ],
)
def test_unsloth_is_refused_where_it_has_no_source(fields):
    request = parse_request({**KERNELS, **fields})
    config = find_model(request.model, Access.CATALOGUE).config
    with pytest.raises(UnsupportedCombinationError):
        resolve(request, config, request.model)


@pytest.mark.parametrize(
    ("tokens", "vocab", "hidden", "rows"),
    [
        (2 * 2048, 128256, 4096, 1024),
        (1 * 2048, 32000, 4096, None),
        (2 * 2048, 32000, 4096, None),
        (4 * 8192, 32768, 4096, 4096),
        (8 * 4096, 50021, 1152, 4096),
        (1 * 8192, 128256, 4096, 2048),
    ],
)
def test_the_loss_is_cut_as_get_chunk_size_cuts_it(tokens, vocab, hidden, rows):
    """Rows of the first chunk, from unsloth_zoo 2026.10.9's own `get_chunk_size` at 4 GiB."""
    spec = read(
        Config({
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": 4 * hidden,
            "num_hidden_layers": 2, "num_attention_heads": hidden // 64, "vocab_size": vocab,
        })
    )  # fmt: skip
    assert UnslothLoss().rows(spec, tokens) == rows


def test_a_layer_saves_what_its_functions_save():
    """Saved for each token of a layer, in the functions of `kernels/`.

    Two norms save their inputs (4 bytes for their 1 / rms each), LoRA_QKV and LoRA_MLP theirs,
    flash attention queries, keys, values, output and log-sum-exp, LoRA_W the output again, and
    LoRA_MLP gate and up as well.
    """
    tokens, hidden, ffn, heads, layers = 1024, 4096, 11008, 32, 32
    answers = [
        estimate(parse_request({**KERNELS, "micro_batch_size": 1, "seq_len": length})).timeline
        for length in (tokens, 2 * tokens)
    ]
    short, long = ({each.moment: each.components for each in answer} for answer in answers)
    grown = [each["loss backward"]["activations"] for each in (long, short)]
    a_token = 2 * (4 * hidden + 4 * hidden + 2 * ffn) + 2 * 4 + 4 * heads
    # Beside the layers: hidden states and the loss, a few rows of the hidden width.
    rest = grown[0] - grown[1] - layers * tokens * a_token
    assert 0 < rest < 12 * tokens * 2 * hidden


def test_adapters_have_the_weights_of_plain_lora():
    with_kernels, without = (
        estimate(parse_request({**KERNELS, "kernels": kernels})) for kernels in (["unsloth"], [])
    )
    assert with_kernels.parameters == without.parameters


def test_the_buffer_is_as_large_as_the_largest_weight():
    """`_scratch` grows with the largest weight, gate or down of 4096 times 11008, in bf16."""
    packed = estimate(parse_request({**KERNELS, "quantization": NF4}))
    plain = estimate(parse_request({**KERNELS}))
    more = packed.timeline[0].components["buffers"] - plain.timeline[0].components["buffers"]
    assert more == 2 * 4096 * 11008
