"""LoRA with everything that PEFT lets one switch on, alone and in combination."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

NF4: Final[Document] = {"quantization": {"name": "nf4"}, "autocast": "bf16"}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}


def _lora(**knobs: Any) -> Document:
    return {"method": {"name": "lora", "r": 12, **knobs}}


EACH: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _in_layers(*numbers: int, **knobs: Any) -> Document:
    return _lora(target_modules=EACH, layers_to_transform=list(numbers), **knobs)


RECIPES: Final[dict[str, Document]] = {
    # modules_to_save
    "lora, head saved": _lora(modules_to_save=["lm_head"]),
    "lora, head and embeddings saved": _lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora, embeddings saved, checkpointed": {
        **_lora(modules_to_save=["embed_tokens"]), **CHECKPOINTED,
    },
    "qlora, head and embeddings saved, checkpointed": {
        **_lora(modules_to_save=["lm_head", "embed_tokens"]), **NF4, **CHECKPOINTED,
    },
    "lora, head saved, tied": _lora(modules_to_save=["lm_head"]),
    "lora, embeddings saved, tied": _lora(modules_to_save=["embed_tokens"]),
    "lora, both saved, tied, amp": {
        **_lora(modules_to_save=["lm_head", "embed_tokens"]), "precision": "amp_bf16",
    },
    "lora, norms saved": _lora(modules_to_save=["norm", "layernorm"]),
    # biases
    "lora, every bias": _lora(bias="all"),
    "lora, every bias, checkpointed": {**_lora(bias="all"), **CHECKPOINTED},
    "lora, every bias, autocast": {**_lora(bias="all"), "autocast": "bf16"},
    "lora, biases of its layers": _lora(bias="lora_only", target_modules=["q_proj", "v_proj"]),
    "lora, bias of B": _lora(lora_bias=True),
    "lora, bias of B, dropout, amp": {
        **_lora(lora_bias=True, lora_dropout=0.1), "precision": "amp_bf16",
    },
    "qlora, bias of B, checkpointed": {**_lora(lora_bias=True), **NF4, **CHECKPOINTED},
    # layers and ranks
    "lora, last two layers": _in_layers(3, 4),
    "lora, last two layers, checkpointed": {**_in_layers(3, 4), **CHECKPOINTED},
    "qlora, first layers": {**_in_layers(0, 1), **NF4, **CHECKPOINTED},
    "lora, every other layer, fp32": {**_in_layers(1, 3), "precision": "fp32"},
    "lora, last layer and embeddings saved": _in_layers(4, modules_to_save=["embed_tokens"]),
    "lora, other ranks": _lora(rank_pattern={"q_proj": 64, "down_proj": 4}),
    "lora, other rank in one layer": _lora(rank_pattern={"layers.2.self_attn.q_proj": 128}),
    "lora, down projections left out": _lora(exclude_modules=["down_proj"]),
    # settings that change no byte
    "rslora": _lora(use_rslora=True),
    "pissa": _lora(init_lora_weights="pissa"),
    "lora+": _lora(loraplus_lr_ratio=16.0),
    "lora+ checkpointed": {**_lora(loraplus_lr_ratio=16.0), **CHECKPOINTED},
    # DoRA
    "dora": _lora(use_dora=True),
    "dora checkpointed": {**_lora(use_dora=True), **CHECKPOINTED},
    "dora dropout": _lora(use_dora=True, lora_dropout=0.05),
    "dora dropout checkpointed": {**_lora(use_dora=True, lora_dropout=0.05), **CHECKPOINTED},
    "dora in the base's type": _lora(use_dora=True, adapter_dtype="base"),
    "dora autocast": {**_lora(use_dora=True), "autocast": "bf16"},
    "dora dropout amp": {**_lora(use_dora=True, lora_dropout=0.05), "precision": "amp_bf16"},
    "dora fp32 dropout": {**_lora(use_dora=True, lora_dropout=0.05), "precision": "fp32"},
    "dora conv1d": _lora(use_dora=True, lora_dropout=0.05),
    "dora biases": _lora(use_dora=True),
    "dora short checkpointed": {
        **_lora(use_dora=True), **CHECKPOINTED, "micro_batch_size": 1, "seq_len": 130,
    },
    "qdora": {**_lora(use_dora=True), **NF4},
    "qdora checkpointed": {**_lora(use_dora=True), **NF4, **CHECKPOINTED},
    "qdora dropout checkpointed": {
        **_lora(use_dora=True, lora_dropout=0.05), **NF4, **CHECKPOINTED,
    },
    "qdora without autocast": {**_lora(use_dora=True), "quantization": {"name": "nf4"}},
    # VeRA
    "vera": {"method": "vera"},
    "vera dropout checkpointed": {
        "method": {"name": "vera", "r": 64, "vera_dropout": 0.1}, **CHECKPOINTED,
    },
    "vera amp": {"method": {"name": "vera", "vera_dropout": 0.1}, "precision": "amp_bf16"},
    "vera over nf4, checkpointed": {"method": "vera", **NF4, **CHECKPOINTED},
    "vera conv1d": {"method": "vera"},
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "lora, head saved, tied": "llama-tied",
    "lora, embeddings saved, tied": "qwen2",
    "lora, both saved, tied, amp": "llama-tied",
    "lora, every bias": "qwen2",
    "lora, every bias, checkpointed": "starcoder2",
    "lora, every bias, autocast": "opt",
    "lora, biases of its layers": "qwen2",
    "dora conv1d": "gpt2",
    "dora biases": "qwen2",
    "vera conv1d": "gpt2",
}

FAST: Final = frozenset(
    {
        "lora, head saved, tied",
        "lora, every bias",
        "lora, last two layers, checkpointed",
        "dora",
        "qdora checkpointed",
    }
)
