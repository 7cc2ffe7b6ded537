"""Random requests over small models of odd shape."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from estimator.request import METHOD_ALIASES, METHODS, QUANTIZATIONS, EstimateRequest
from estimator.techniques.execution import CHECKPOINTING
from estimator.techniques.kernels import KERNELS
from estimator.techniques.loss import FUSED_LOSSES
from estimator.techniques.optimizers import OPTIMIZERS
from tests.conformance.cases import MODELS

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


def _choices(field: str) -> tuple[str, ...]:
    """Return the words that a field of the request takes."""
    return get_args(EstimateRequest.__annotations__[field])


# Every technique that there is, read from the tables: a new one is drawn without being named here.
TECHNIQUES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "optimizer": st.sampled_from(sorted(OPTIMIZERS)).map(
        lambda name: {"optimizer": {"name": name, **dict.fromkeys(OPTIMIZERS[name].needs, 0.9)}}
    ),
    "in backward": st.sampled_from(sorted(OPTIMIZERS)).map(
        lambda name: {"optimizer": {"name": name, "in_backward": True}}
    ),
    "quantization": st.sampled_from(QUANTIZATIONS).map(lambda kind: {"quantization": kind().name}),
    "precision": st.sampled_from(_choices("precision")).map(lambda word: {"precision": word}),
    "autocast": st.sampled_from(["bf16", "fp16"]).map(lambda word: {"autocast": word}),
    "attention": st.sampled_from(_choices("attention")).map(lambda word: {"attention": word}),
    "loss": st.sampled_from(sorted(FUSED_LOSSES)).map(lambda word: {"loss": word}),
    "kernels": st.sampled_from(sorted(KERNELS)).map(lambda word: {"kernels": [word]}),
    "checkpointing": st.sampled_from([*CHECKPOINTING, "every_3_offload"]).map(
        lambda word: {"activation_checkpointing": word}
    ),
    "batch": st.sampled_from(["padding", "packing"]).map(lambda word: {word: True}),
    "accumulation": st.integers(2, 4).map(lambda steps: {"gradient_accumulation_steps": steps}),
    "loop": st.sampled_from(
        [
            {"keep_outputs": True},
            {"keep_outputs": True, "use_cache": True},
            {"set_to_none": False},
            {"neftune_noise_alpha": 5.0},
            {"label_smoothing_factor": 0.1},
            {"max_grad_norm": 0.0},
            {"ema": "cuda"},
            {"ema": "cpu"},
            {"logits_to_keep": 7},
            {"own_loss": True},
        ]
    ).map(lambda loop: {"loop": loop}),
    "8 bits": st.sampled_from(["torchao", "te"]).map(lambda name: {"fp8": {"name": name}}),
    "quantization-aware training": st.just({"qat": {"name": "torchao"}}),
    "software": st.sampled_from(
        ["trl", "torchtune", "litgpt", {"framework": "transformers", "version": "4"}]
    ).map(lambda software: {"software": software}),
}
METHOD_NAMES = tuple(sorted({kind().name for kind in METHODS} | METHOD_ALIASES.keys()))


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a method and up to four other techniques over a model of any family.

    Many combinations are refused by name; `test_most_combinations_are_answered` keeps an eye on it.
    """
    document: dict[str, Any] = {
        "model": {"config": draw(st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__))},
        "method": draw(st.one_of(st.just("full"), st.just("lora"), st.sampled_from(METHOD_NAMES))),
        "micro_batch_size": draw(st.integers(1, 4)),
        "seq_len": draw(st.integers(1, 900)),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(TECHNIQUES)), max_size=4, unique=True))
    for name in chosen:
        document |= draw(TECHNIQUES[name])
    return document
