"""Methods of PEFT whose adapters do more than a pair of matrices."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
NF4: Final[Document] = {"quantization": {"name": "nf4"}, "autocast": "bf16"}
PADDED: Final[Document] = {"padding": True}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}

ADALORA: Final[Document] = {"method": "adalora"}
ADALORA_ALL: Final[Document] = {
    "method": {"name": "adalora", "target_modules": "all-linear", "lora_dropout": 0.05},
}
ADALORA_SCORED: Final[Document] = {"method": {"name": "adalora", "update_and_allocate": True}}

TOKENS: Final[Document] = {"method": {"name": "trainable_tokens", "num_tokens": 300}}
LORA_TOKENS: Final[Document] = {
    "method": {"name": "lora", "trainable_token_indices": list(range(40))},
}

PARAMETERS: Final[Document] = {
    "method": {
        "name": "lora",
        "target_modules": [],
        "target_parameters": ["mlp.down_proj.weight", "self_attn.q_proj.weight"],
    },
}
OF_GPT2: Final[Document] = {
    "method": {
        "name": "lora",
        "target_modules": [],
        "target_parameters": ["mlp.c_fc.weight", "attn.c_attn.weight"],
    },
}

ADAPTION: Final[Document] = {"method": {"name": "adaption_prompt", "adapter_layers": 3}}
ADAPTION_ALL: Final[Document] = {"method": "adaption_prompt"}

VBLORA: Final[Document] = {
    "method": {"name": "vblora", "vector_length": 128, "num_vectors": 90},
}
VBLORA_ALL: Final[Document] = {
    "method": {
        "name": "vblora",
        "vector_length": 8,
        "topk": 3,
        "vblora_dropout": 0.05,
        "target_modules": "all-linear",
    },
}

RECIPES: Final[dict[str, Document]] = {
    "adalora": ADALORA,
    "adalora checkpointed": {**ADALORA, **CHECKPOINTED},
    "adalora short checkpointed, every linear layer": {**ADALORA_ALL, **CHECKPOINTED, **SHORT},
    "adalora on every linear layer": ADALORA_ALL,
    "adalora amp": {**ADALORA, "precision": "amp_bf16"},
    "adalora autocast": {**ADALORA_ALL, "autocast": "bf16"},
    "adalora fp32": {**ADALORA_ALL, "precision": "fp32"},
    "adalora nf4": {**ADALORA_ALL, **NF4, **CHECKPOINTED},
    "adalora nf4 without autocast": {**ADALORA_ALL, "quantization": "nf4"},
    "adalora int8": {**ADALORA, "quantization": "int8"},
    "adalora int8 autocast": {
        **ADALORA, "quantization": {"name": "int8", "prepare_kbit": False}, "autocast": "bf16",
    },
    "adalora scored": ADALORA_SCORED,
    "adalora scored, sgd, short": {**ADALORA_SCORED, **SHORT, "optimizer": "sgd"},
    "adalora accumulation": {**ADALORA, "gradient_accumulation_steps": 4},
    "adalora head saved": {
        "method": {
            "name": "adalora", "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head"],
        },
    },
    "adalora conv1d": ADALORA_ALL,
    "adalora biases": {**ADALORA_ALL, **CHECKPOINTED},
    "adalora smoothed": {**ADALORA, "loop": {"label_smoothing_factor": 0.1}},
    "adalora with trl": {**ADALORA, "software": "trl"},
    "adalora fused loss": {**ADALORA, "loss": "fused_linear"},
    "trainable tokens": TOKENS,
    "trainable tokens checkpointed": {**TOKENS, **CHECKPOINTED},
    "trainable tokens amp": {**TOKENS, "precision": "amp_bf16"},
    "trainable tokens nf4 checkpointed": {**TOKENS, **NF4, **CHECKPOINTED},
    "trainable tokens tied, amp": {**TOKENS, "precision": "amp_bf16"},
    "trainable tokens tied, short": {**TOKENS, **SHORT},
    "trainable tokens of gpt2": {**TOKENS, **PADDED},
    "trainable tokens of gemma3": {**TOKENS, **CHECKPOINTED},
    "lora, tokens": LORA_TOKENS,
    "lora, tokens, tied, checkpointed": {**LORA_TOKENS, **CHECKPOINTED},
    "lora, tokens, nf4": {**LORA_TOKENS, **NF4, **CHECKPOINTED},
    "lora, tokens, accumulation": {**LORA_TOKENS, "gradient_accumulation_steps": 4},
    "lora, parameters": PARAMETERS,
    "lora, parameters, checkpointed": {**PARAMETERS, **CHECKPOINTED},
    "lora, parameters, amp": {**PARAMETERS, "precision": "amp_bf16"},
    "lora, parameters, autocast, short": {**PARAMETERS, **SHORT, "autocast": "bf16"},
    "lora, parameters, fp32": {**PARAMETERS, "precision": "fp32"},
    "lora, parameters, biases": {**PARAMETERS, "gradient_accumulation_steps": 4},
    "adaption prompt": ADAPTION,
    "adaption prompt checkpointed": {**ADAPTION, **CHECKPOINTED},
    "adaption prompt in every layer, autocast": {**ADAPTION_ALL, "autocast": "bf16"},
    "adaption prompt in every layer, amp": {**ADAPTION_ALL, "precision": "amp_bf16"},
    "adaption prompt of many heads, fp32": {**ADAPTION, "precision": "fp32"},
    "adaption prompt of mistral": {**ADAPTION, **PADDED},
    "adaption prompt of gpt2": ADAPTION,
    "adaption prompt, short": {**ADAPTION_ALL, **SHORT, "gradient_accumulation_steps": 2},
    "vblora": VBLORA,
    "vblora checkpointed": {**VBLORA, **CHECKPOINTED},
    "vblora on every linear layer": VBLORA_ALL,
    "vblora on every linear layer, amp": {**VBLORA_ALL, "precision": "amp_bf16"},
    "vblora on every linear layer, short": {**VBLORA_ALL, **SHORT, **CHECKPOINTED},
    "vblora nf4": {**VBLORA, **NF4, **CHECKPOINTED},
    "vblora accumulation": {**VBLORA, "gradient_accumulation_steps": 4},
    "vblora conv1d": VBLORA_ALL,
    "vblora of qwen2": {**VBLORA, "autocast": "bf16"},
    "lora, parameters of conv1d": {**OF_GPT2, **CHECKPOINTED},
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "adalora checkpointed": "llama-tied",
    "adalora conv1d": "gpt2",
    "adalora biases": "qwen2",
    "trainable tokens tied, amp": "llama-tied",
    "trainable tokens tied, short": "llama-tied",
    "trainable tokens of gpt2": "gpt2",
    "lora, parameters, biases": "qwen2",
    "lora, parameters of conv1d": "gpt2",
    "vblora conv1d": "gpt2",
    "vblora of qwen2": "qwen2",
    "adaption prompt of many heads, fp32": "llama-mha",
    "adaption prompt of mistral": "mistral-window",
    "adaption prompt of gpt2": "gpt2",
    "trainable tokens of gemma3": "gemma3",
    "lora, tokens, tied, checkpointed": "qwen2",
}

FAST: Final = frozenset(
    {"adalora", "lora, tokens, tied, checkpointed", "lora, parameters", "adaption prompt", "vblora"}
)
