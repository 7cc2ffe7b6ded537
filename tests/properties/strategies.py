"""Random requests over small models of odd shape."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from estimator.techniques.execution import CHECKPOINTING

ATTENTION = ("eager", "sdpa", "sdpa_math", "flash_attention_2", "flash_attention_3")
SETTINGS: dict[str, Any] = {"max_examples": 20, "deadline": None}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the configuration of a model with odd sizes."""
    groups = draw(st.sampled_from([1, 2, 3]))
    key_value = draw(st.sampled_from([1, 2, 5]))
    head_dim = draw(st.sampled_from([16, 40, 64]))
    config: dict[str, Any] = {
        "model_type": draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])),
        "hidden_size": draw(st.sampled_from([96, 200, 512])),
        "intermediate_size": draw(st.sampled_from([136, 1000])),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_attention_heads": groups * key_value,
        "num_key_value_heads": key_value,
        "head_dim": head_dim,
        "vocab_size": draw(st.sampled_from([331, 5003])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if config["model_type"] == "mistral":
        config["sliding_window"] = draw(st.sampled_from([None, 64]))
    return config


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a request document that the engine answers."""
    method = draw(st.sampled_from(["full", "lora", "qlora"]))
    precisions = ["fp32", "bf16", "fp16"]
    if method != "qlora":
        precisions += ["amp_bf16", "amp_fp16", "master_bf16"]
    document: dict[str, Any] = {
        "model": {"config": draw(configs())},
        "method": method,
        "precision": draw(st.sampled_from(precisions)),
        "autocast": draw(st.sampled_from([None, "bf16"])),
        "optimizer": draw(
            st.sampled_from(
                ["sgd", "sgd_momentum", "adam", "adamw_torch", "adamw_torch_fused", "adamw_8bit",
                 "paged_adamw_8bit", "adafactor"]
            )
        ),
        "micro_batch_size": draw(st.integers(1, 9)),
        "seq_len": draw(st.integers(1, 3000)),
        "gradient_accumulation_steps": draw(st.integers(1, 3)),
        "padding": draw(st.booleans()),
        "packing": draw(st.booleans()),
        "activation_checkpointing": draw(st.sampled_from([*CHECKPOINTING, "every_3_offload"])),
        "attention": draw(st.sampled_from(ATTENTION)),
        "loop": {
            "keep_outputs": draw(st.booleans()),
            "use_cache": draw(st.booleans()),
            "set_to_none": draw(st.booleans()),
        },
        "hardware": {"gpu": draw(st.sampled_from([None, "rtx-4090", "h200-141gb-sxm"]))},
    }  # fmt: skip
    return document
