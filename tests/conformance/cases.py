"""The conformance grid: recipes on small models of odd shape, written as request documents.

No formula was tuned on these shapes: vocabularies that are no multiple of anything, head counts
that are no power of two, a micro-batch of 3, a length of 1000.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tests.conformance import grids

Document = dict[str, Any]


class Case(NamedTuple):
    """One case: a name that says what is unusual about it, and the request."""

    name: str
    document: Document
    fast: bool


SHAPE: Final[Document] = {"micro_batch_size": 3, "seq_len": 1000}

# Every family with sizes of its own; three or more layers, so that first, inner and last differ.
MODELS: Final[dict[str, Document]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 1152, "intermediate_size": 3016,
        "num_hidden_layers": 5, "num_attention_heads": 18, "num_key_value_heads": 6,
        "vocab_size": 50021, "tie_word_embeddings": False,
    },
    "llama-tied": {
        "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 4, "num_attention_heads": 15, "num_key_value_heads": 5,
        "vocab_size": 49153, "tie_word_embeddings": True,
    },
    "llama-mha": {
        "model_type": "llama", "hidden_size": 1280, "intermediate_size": 3456,
        "num_hidden_layers": 4, "num_attention_heads": 20, "num_key_value_heads": 20,
        "vocab_size": 32003, "tie_word_embeddings": False,
    },
    "mistral-window": {
        "model_type": "mistral", "hidden_size": 1024, "intermediate_size": 3584,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
        "vocab_size": 32001, "sliding_window": 512, "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 5, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 75969, "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 60013, "tie_word_embeddings": False,
    },
    "gemma": {
        "model_type": "gemma", "hidden_size": 1024, "intermediate_size": 4100,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 1,
        "head_dim": 256, "vocab_size": 60007, "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 60007, "sliding_window": 512, "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 3456,
        "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 128, "vocab_size": 60007, "sliding_window": 512, "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3", "hidden_size": 1152, "intermediate_size": 3072,
        "num_hidden_layers": 4, "num_attention_heads": 18, "num_key_value_heads": 6,
        "vocab_size": 32064, "tie_word_embeddings": False, "pad_token_id": 0,
    },
    "starcoder2": {
        "model_type": "starcoder2", "hidden_size": 1152, "intermediate_size": 4608,
        "num_hidden_layers": 4, "num_attention_heads": 18, "num_key_value_heads": 2,
        "vocab_size": 49157, "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 960, "n_layer": 4, "n_head": 15, "n_positions": 1024,
        "vocab_size": 50257,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 50307,
        "tie_word_embeddings": False,
    },
    "opt": {
        "model_type": "opt", "hidden_size": 960, "ffn_dim": 3840, "num_hidden_layers": 4,
        "num_attention_heads": 15, "vocab_size": 50273, "max_position_embeddings": 2048,
    },
    "falcon": {
        "model_type": "falcon", "hidden_size": 1136, "num_hidden_layers": 4,
        "num_attention_heads": 71, "vocab_size": 50021, "multi_query": True,
        "parallel_attn": True, "new_decoder_architecture": False, "bias": False, "alibi": False,
    },
    "falcon-new": {
        "model_type": "falcon", "hidden_size": 1152, "num_hidden_layers": 4,
        "num_attention_heads": 18, "num_kv_heads": 6, "vocab_size": 50021,
        "new_decoder_architecture": True, "parallel_attn": True, "bias": False, "alibi": False,
    },
    "bloom": {
        "model_type": "bloom", "hidden_size": 1024, "n_layer": 4, "n_head": 16,
        "vocab_size": 60007,
    },
}  # fmt: skip

FULL: Final[Document] = {"optimizer": "adamw_torch"}
LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.0}}
LORA_DROPOUT: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.05}}
LORA_BASE: Final[Document] = {"method": {"name": "lora", "r": 12, "adapter_dtype": "base"}}
QLORA: Final[Document] = {
    "method": {"name": "lora", "r": 12, "lora_dropout": 0.05},
    "quantization": {"name": "nf4"},
    "autocast": "bf16",
}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}

# Run on every family.
EVERYWHERE: Final[dict[str, Document]] = {
    "full bf16": FULL,
    "full fp32": {**FULL, "precision": "fp32"},
    "full amp_bf16": {**FULL, "precision": "amp_bf16"},
    "full bf16 checkpointed": {**FULL, **CHECKPOINTED},
    "lora": LORA,
    "lora checkpointed": {**LORA, **CHECKPOINTED},
    "qlora checkpointed": {**QLORA, **CHECKPOINTED},
    "eager": {**FULL, "attention": "eager"},
}

# Run on one model: what does not depend on the family.
RECIPES: Final[dict[str, Document]] = {
    "full fp16": {**FULL, "precision": "fp16"},
    "full amp_fp16": {**FULL, "precision": "amp_fp16"},
    "full master_bf16": {**FULL, "precision": "master_bf16"},
    "full autocast over bf16": {**FULL, "autocast": "bf16"},
    "amp_bf16 checkpointed": {**FULL, **CHECKPOINTED, "precision": "amp_bf16"},
    "fp32 checkpointed": {**FULL, **CHECKPOINTED, "precision": "fp32"},
    "sgd": {"optimizer": "sgd"},
    "sgd momentum": {"optimizer": {"name": "sgd", "momentum": 0.9}},
    "adam foreach": {"optimizer": {"name": "adam", "implementation": "foreach"}},
    "adamw fused": {"optimizer": "adamw_torch_fused"},
    "adamw single": {"optimizer": {"name": "adamw", "implementation": "single"}},
    "adamw 8-bit": {"optimizer": "adamw_8bit"},
    "paged adamw 8-bit": {"optimizer": "paged_adamw_8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "adafactor fp32": {"optimizer": "adafactor", "precision": "fp32"},
    "accumulation": {**FULL, "gradient_accumulation_steps": 4},
    "accumulation checkpointed": {**FULL, **CHECKPOINTED, "gradient_accumulation_steps": 4},
    "outputs kept": {**FULL, "loop": {"keep_outputs": True}},
    "outputs kept amp": {**FULL, "precision": "amp_bf16", "loop": {"keep_outputs": True}},
    "cache kept": {**FULL, "loop": {"use_cache": True, "keep_outputs": True}},
    "padded sdpa": {**FULL, "padding": True},
    "padded sdpa amp": {**FULL, "padding": True, "precision": "amp_bf16"},
    "padded sdpa checkpointed": {**FULL, **CHECKPOINTED, "padding": True},
    "padded eager": {**FULL, "padding": True, "attention": "eager"},
    "flash": {**FULL, "attention": "flash_attention_2"},
    "flash padded": {**FULL, "attention": "flash_attention_2", "padding": True},
    "flash amp": {**FULL, "attention": "flash_attention_2", "precision": "amp_bf16"},
    "flash checkpointed": {**FULL, **CHECKPOINTED, "attention": "flash_attention_2"},
    "lora dropout": LORA_DROPOUT,
    "lora dropout checkpointed": {**LORA_DROPOUT, **CHECKPOINTED},
    "lora in the base's type": LORA_BASE,
    "lora autocast": {**LORA, "autocast": "bf16"},
    "lora dropout autocast": {**LORA_DROPOUT, "autocast": "bf16"},
    "lora fp32": {**LORA, "precision": "fp32"},
    "lora amp": {**LORA, "precision": "amp_bf16"},
    "lora eager": {**LORA, "attention": "eager"},
    "lora padded": {**LORA, "padding": True},
    "lora accumulation": {**LORA, "gradient_accumulation_steps": 4},
    "qlora": QLORA,
    "qlora single quant": {
        **QLORA, "quantization": {"name": "nf4", "double_quant": False},
    },
    "qlora fp4": {**QLORA, "quantization": {"name": "fp4"}},
    "qlora without k-bit preparation": {
        **QLORA, "quantization": {"name": "nf4", "prepare_kbit": False},
    },
    "qlora without autocast": {**QLORA, "autocast": None},
    "qlora without either": {
        **QLORA, "autocast": None, "quantization": {"name": "nf4", "prepare_kbit": False},
    },
    "qlora paged": {**QLORA, **CHECKPOINTED, "optimizer": "paged_adamw_8bit"},
    "short": {**FULL, "micro_batch_size": 1, "seq_len": 130},
    "short lora": {**LORA, "micro_batch_size": 1, "seq_len": 130},
    "short qlora": {**QLORA, **CHECKPOINTED, "micro_batch_size": 1, "seq_len": 130},
    "3072 tokens": {**FULL, **CHECKPOINTED, "micro_batch_size": 3, "seq_len": 1024},
    "3075 tokens": {**FULL, **CHECKPOINTED, "micro_batch_size": 3, "seq_len": 1025},
    "long": {**FULL, **CHECKPOINTED, "micro_batch_size": 1, "seq_len": 9001},
    "long lora": {**LORA, **CHECKPOINTED, "micro_batch_size": 1, "seq_len": 9001},
    "single token": {**FULL, "micro_batch_size": 1, "seq_len": 1},
}  # fmt: skip

# The subset that every test run covers: each family once, and every recipe of one model that
# touches code of its own.
FAST_EVERYWHERE: Final = {"full bf16", "lora checkpointed"}
FAST_RECIPES: Final = {
    "full master_bf16", "adamw fused", "adamw 8-bit", "adafactor", "accumulation", "outputs kept",
    "padded sdpa", "flash", "lora dropout", "lora autocast", "qlora", "short qlora", "3075 tokens",
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the whole grid."""
    for family, config in MODELS.items():
        for recipe, changes in EVERYWHERE.items():
            yield _case(f"{family}: {recipe}", config, changes, recipe in FAST_EVERYWHERE)
    for recipe, changes in RECIPES.items():
        yield _case(f"llama: {recipe}", MODELS["llama"], changes, recipe in FAST_RECIPES)
    for grid in grids.GRIDS:
        for recipe, changes in grid.RECIPES.items():
            model = grid.MODELS.get(recipe, "llama")
            yield _case(f"{model}: {recipe}", MODELS[model], changes, recipe in grid.FAST)


def _case(name: str, config: Document, changes: Document, fast: bool) -> Case:
    return Case(name, {"model": {"config": config}, **SHAPE, **changes}, fast)
