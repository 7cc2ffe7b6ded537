"""Methods of PEFT other than the LoRA family: virtual tokens, and adapters of other shapes."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
NF4: Final[Document] = {"quantization": {"name": "nf4"}, "autocast": "bf16"}
PADDED: Final[Document] = {"padding": True}

PROMPT: Final[Document] = {"method": {"name": "prompt_tuning", "num_virtual_tokens": 24}}
P_TUNING: Final[Document] = {"method": {"name": "p_tuning", "encoder_hidden_size": 500}}
PREFIX: Final[Document] = {"method": {"name": "prefix_tuning", "num_virtual_tokens": 24}}
PROJECTED: Final[Document] = {
    "method": {"name": "prefix_tuning", "num_virtual_tokens": 24, "prefix_projection": True},
}

IA3: Final[Document] = {"method": "ia3"}
LN: Final[Document] = {"method": "ln_tuning"}
LOHA: Final[Document] = {"method": "loha"}
LOKR: Final[Document] = {"method": "lokr"}
OFT: Final[Document] = {"method": "oft"}
BOFT: Final[Document] = {"method": "boft"}
FOURIER: Final[Document] = {"method": "fourierft"}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}

RECIPES: Final[dict[str, Document]] = {
    "prompt tuning": PROMPT,
    "prompt tuning checkpointed": {**PROMPT, **CHECKPOINTED},
    "prompt tuning amp": {**PROMPT, "precision": "amp_bf16"},
    "prompt tuning nf4 checkpointed": {**PROMPT, **NF4, **CHECKPOINTED},
    "prompt tuning padded": {**PROMPT, **PADDED},
    "prompt tuning eager": {**PROMPT, "attention": "eager"},
    "prompt tuning accumulation": {**PROMPT, "gradient_accumulation_steps": 4},
    "prompt tuning of gpt2": {**PROMPT, "seq_len": 1000},
    "prompt tuning of gemma": PROMPT,
    "p-tuning": P_TUNING,
    "p-tuning amp checkpointed": {**P_TUNING, **CHECKPOINTED, "precision": "amp_bf16"},
    "p-tuning nf4": {**P_TUNING, **NF4},
    "p-tuning of opt": {"method": "p_tuning"},
    "prefix tuning": PREFIX,
    "prefix tuning, 20 tokens": {"method": "prefix_tuning"},
    "prefix tuning amp": {**PREFIX, "precision": "amp_bf16"},
    "prefix tuning nf4": {**PREFIX, **NF4},
    "prefix tuning padded": {**PREFIX, **PADDED},
    "prefix tuning eager": {**PREFIX, "attention": "eager"},
    "prefix tuning flash": {**PREFIX, "attention": "flash_attention_2"},
    "prefix tuning fp32": {**PREFIX, "precision": "fp32"},
    "prefix tuning of gpt_neox": PREFIX,
    "prefix tuning with a projection": PROJECTED,
    "prefix tuning with a projection, amp": {**PROJECTED, "precision": "amp_bf16"},
    "prefix tuning with a projection, accumulation": {
        **PROJECTED, "gradient_accumulation_steps": 4,
    },
    "ia3": IA3,
    "ia3 checkpointed": {**IA3, **CHECKPOINTED},
    "ia3 amp": {**IA3, "precision": "amp_bf16"},
    "ia3 nf4": {**IA3, **NF4},
    "ia3 nf4 without autocast": {**IA3, "quantization": "nf4"},
    "ia3 int8": {**IA3, "quantization": "int8", "autocast": "bf16"},
    "ia3 on every linear layer": {"method": {"name": "ia3", "target_modules": "all-linear"}},
    "ia3 of bloom": {**IA3, **CHECKPOINTED},
    "ln tuning": LN,
    "ln tuning amp": {**LN, "precision": "amp_bf16"},
    "ln tuning nf4 checkpointed": {**LN, **NF4, **CHECKPOINTED},
    "ln tuning padded": {**LN, **PADDED},
    "ln tuning of gemma3": {**LN, **CHECKPOINTED},
    "loha": LOHA,
    "loha short checkpointed": {**LOHA, **CHECKPOINTED, **SHORT},
    "loha amp": {**LOHA, "precision": "amp_bf16"},
    "loha on every linear layer": {
        "method": {"name": "loha", "target_modules": "all-linear"}, "precision": "fp32",
    },
    "lokr": LOKR,
    "lokr short checkpointed": {**LOKR, **CHECKPOINTED, **SHORT},
    "lokr amp, both decomposed": {
        "method": {"name": "lokr", "r": 4, "decompose_both": True}, "precision": "amp_bf16",
    },
    "lokr padded": {**LOKR, **PADDED, "optimizer": "sgd"},
    "oft": OFT,
    "oft checkpointed": {**OFT, **CHECKPOINTED},
    "oft amp": {**OFT, "precision": "amp_bf16"},
    "oft nf4": {**OFT, **NF4},
    "oft of opt": {**OFT, **PADDED},
    "boft": BOFT,
    "boft short checkpointed": {**BOFT, **CHECKPOINTED, **SHORT},
    "boft amp": {**BOFT, "precision": "amp_bf16"},
    "boft nf4": {**BOFT, **NF4},
    "fourierft": FOURIER,
    "fourierft short checkpointed": {**FOURIER, **CHECKPOINTED, **SHORT},
    "fourierft amp": {**FOURIER, "precision": "amp_bf16"},
    "fourierft nf4": {**FOURIER, **NF4},
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "prompt tuning of gpt2": "gpt2",
    "prompt tuning of gemma": "gemma",
    "p-tuning amp checkpointed": "qwen2",
    "p-tuning of opt": "opt",
    "prefix tuning of gpt_neox": "gpt_neox",
    "prefix tuning with a projection, amp": "gpt2",
    "prefix tuning with a projection": "llama-mha",
    "ia3 checkpointed": "gpt2",
    "ia3 of bloom": "bloom",
    "ln tuning amp": "gpt2",
    "ln tuning of gemma3": "gemma3",
    "loha amp": "opt",
    "lokr amp, both decomposed": "qwen2",
    "oft of opt": "opt",
    "boft amp": "qwen2",
    "fourierft amp": "gpt2",
}

FAST: Final = frozenset(
    {
        "prompt tuning",
        "p-tuning amp checkpointed",
        "prefix tuning",
        "ia3",
        "ln tuning",
        "loha",
        "lokr",
        "oft",
        "boft",
        "fourierft",
    }
)
