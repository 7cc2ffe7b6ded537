"""Losses that take hidden states, and kernels that replace parts of the model."""

from __future__ import annotations

from typing import Any, Final

_FULL: Final[dict[str, Any]] = {"optimizer": "adamw_torch"}
_LORA: Final[dict[str, Any]] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.0}}
_QLORA: Final[dict[str, Any]] = {
    "method": {"name": "lora", "r": 12, "lora_dropout": 0.05},
    "quantization": {"name": "nf4"},
    "autocast": "bf16",
}
_CHECKPOINTED: Final[dict[str, Any]] = {"activation_checkpointing": "full"}
_FUSED: Final[dict[str, Any]] = {"loss": "fused_linear"}
_CHUNKED: Final[dict[str, Any]] = {"loss": "chunked"}
_NOISE: Final[dict[str, Any]] = {"loop": {"neftune_noise_alpha": 5.0}}
_SMOOTH: Final[dict[str, Any]] = {"loop": {"label_smoothing_factor": 0.1}}
_LIGER: Final[dict[str, Any]] = {"kernels": ["liger"]}
_CUT: Final[dict[str, Any]] = {"loss": "cut_cross_entropy"}

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "fused_linear": {**_FULL, **_FUSED},
    "fused_linear fp32": {**_FULL, **_FUSED, "precision": "fp32"},
    "fused_linear amp_bf16": {**_FULL, **_FUSED, "precision": "amp_bf16"},
    "fused_linear amp_fp16": {**_FULL, **_FUSED, "precision": "amp_fp16"},
    "fused_linear lora checkpointed": {**_LORA, **_CHECKPOINTED, **_FUSED},
    "fused_linear lora fp32": {**_LORA, **_FUSED, "precision": "fp32"},
    "fused_linear qlora checkpointed": {**_QLORA, **_CHECKPOINTED, **_FUSED},
    "fused_linear tied head": {**_FULL, **_FUSED},
    "fused_linear tied head, amp checkpointed": {
        **_FULL, **_FUSED, **_CHECKPOINTED, "precision": "amp_bf16",
    },
    "fused_linear capped logits": {**_FULL, **_FUSED},
    "fused_linear accumulation padded": {
        **_FULL, **_FUSED, "gradient_accumulation_steps": 3, "padding": True,
    },
    "fused_linear one chunk": {**_FULL, **_FUSED, "micro_batch_size": 1, "seq_len": 13},
    "fused_linear outputs kept": {**_FULL, **_FUSED, "loop": {"keep_outputs": True}},
    "cut_cross_entropy": {**_FULL, **_CUT},
    "cut_cross_entropy fp16 checkpointed": {
        **_FULL, **_CUT, **_CHECKPOINTED, "precision": "fp16",
    },
    "cut_cross_entropy lora checkpointed": {**_LORA, **_CHECKPOINTED, **_CUT},
    "cut_cross_entropy tied head": {**_FULL, **_CUT},
    "cut_cross_entropy capped logits": {**_FULL, **_CUT, **_CHECKPOINTED},
    "cut_cross_entropy autocast over bf16": {**_FULL, **_CUT, "autocast": "bf16"},
    "cut_cross_entropy adafactor checkpointed": {
        "optimizer": "adafactor", **_CUT, **_CHECKPOINTED, "autocast": "bf16",
    },
    "chunked": {**_FULL, **_CHUNKED},
    "chunked fp32": {**_FULL, **_CHUNKED, "precision": "fp32"},
    "chunked amp_bf16 checkpointed, two chunks": {
        **_FULL, **_CHUNKED, **_CHECKPOINTED, "precision": "amp_bf16", "seq_len": 2731,
    },
    "chunked tied head, two chunks": {**_FULL, **_CHUNKED, "seq_len": 2000},
    "chunked lora autocast": {**_LORA, **_CHUNKED, "autocast": "bf16"},
    "chunked qlora checkpointed": {**_QLORA, **_CHUNKED, **_CHECKPOINTED},
    "chunked capped logits, accumulation": {
        **_FULL, **_CHUNKED, "gradient_accumulation_steps": 3,
    },
    "chunked padded": {**_FULL, **_CHUNKED, "padding": True},
    "liger": {**_FULL, **_LIGER},
    "liger with the standard loss": {**_FULL, **_LIGER, "loss": "standard"},
    "liger fp32": {**_FULL, **_LIGER, "precision": "fp32"},
    "liger amp_bf16": {**_FULL, **_LIGER, "precision": "amp_bf16"},
    "liger lora": {**_LORA, **_LIGER},
    "liger lora dropout checkpointed": {
        "method": {"name": "lora", "r": 12, "lora_dropout": 0.05}, **_LIGER, **_CHECKPOINTED,
    },
    "liger qlora checkpointed": {**_QLORA, **_LIGER, **_CHECKPOINTED},
    "liger padded": {**_LORA, **_LIGER, "padding": True},
    "liger flash": {**_LORA, **_LIGER, "attention": "flash_attention_2"},
    "liger eager": {**_LORA, **_LIGER, "attention": "eager"},
    "liger norms of queries and keys": {**_LORA, **_LIGER},
    "liger geglu": {**_LORA, **_LIGER},
    "liger sandwich norms": {**_LORA, **_LIGER},
    "liger gemma 3": {**_LORA, **_LIGER},
    "liger window, accumulation": {**_FULL, **_LIGER, "gradient_accumulation_steps": 3},
    "neftune": {**_FULL, **_CUT, **_NOISE},
    "neftune amp_bf16 checkpointed": {
        **_FULL, **_NOISE, **_CHECKPOINTED, "precision": "amp_bf16",
    },
    "neftune lora checkpointed": {**_LORA, **_NOISE, **_CHECKPOINTED},
    "neftune qlora liger": {**_QLORA, **_NOISE, **_LIGER},
    "label smoothing": {**_FULL, **_SMOOTH},
    "label smoothing amp_bf16": {**_FULL, **_SMOOTH, "precision": "amp_bf16"},
    "label smoothing capped logits, checkpointed": {**_FULL, **_SMOOTH, **_CHECKPOINTED},
    "label smoothing lora autocast": {**_LORA, **_SMOOTH, "autocast": "bf16"},
    "trl": {"software": "trl"},
    "trl lora": {"software": "trl", **_LORA, "precision": "bf16"},
    "trl qlora, adamw 8-bit": {
        "software": "trl", "method": {"name": "lora", "r": 12, "lora_dropout": 0.05},
        "quantization": {"name": "nf4"}, "optimizer": "paged_adamw_8bit",
    },
    "trl liger": {"software": "trl", **_LIGER},
    "liger with cut_cross_entropy": {
        **_FULL, **_LIGER, **_CUT, **_CHECKPOINTED, "optimizer": "adamw_8bit",
    },
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "fused_linear lora checkpointed": "qwen2",
    "fused_linear tied head": "llama-tied",
    "fused_linear tied head, amp checkpointed": "qwen2",
    "fused_linear capped logits": "gemma2",
    "fused_linear accumulation padded": "mistral-window",
    "cut_cross_entropy lora checkpointed": "qwen3",
    "chunked tied head, two chunks": "llama-tied",
    "chunked amp_bf16 checkpointed, two chunks": "qwen2",
    "chunked lora autocast": "gpt_neox",
    "chunked capped logits, accumulation": "gemma2",
    "chunked padded": "falcon",
    "liger lora": "qwen2",
    "neftune amp_bf16 checkpointed": "qwen2",
    "neftune lora checkpointed": "gemma",
    "label smoothing amp_bf16": "gpt2",
    "label smoothing capped logits, checkpointed": "gemma2",
    "trl": "qwen3",
    "liger norms of queries and keys": "qwen3",
    "liger geglu": "gemma",
    "liger sandwich norms": "gemma2",
    "liger gemma 3": "gemma3",
    "liger window, accumulation": "mistral-window",
    "liger with cut_cross_entropy": "llama-tied",
    "cut_cross_entropy tied head": "qwen2",
    "cut_cross_entropy capped logits": "gemma2",
    "cut_cross_entropy fp16 checkpointed": "gpt2",
}

FAST: Final = frozenset(
    {
        "fused_linear", "fused_linear amp_bf16", "cut_cross_entropy", "chunked", "liger",
        "label smoothing",
    }
)  # fmt: skip
