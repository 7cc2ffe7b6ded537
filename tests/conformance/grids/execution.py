"""How the step runs: forms of checkpointing, attention kernels, packing, the loop."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.05}}
QLORA: Final[Document] = {**LORA, "quantization": {"name": "nf4"}, "autocast": "bf16"}


def _checkpointing(kind: str, **changes: Any) -> Document:
    return {"activation_checkpointing": kind, **changes}


RECIPES: Final[dict[str, Document]] = {
    "reentrant": _checkpointing("full_reentrant"),
    "reentrant amp": _checkpointing("full_reentrant", precision="amp_bf16"),
    "reentrant lora accumulation": _checkpointing(
        "full_reentrant", **LORA, gradient_accumulation_steps=4
    ),
    "reentrant qlora": _checkpointing("full_reentrant", **QLORA),
    "reentrant padded": _checkpointing("full_reentrant", padding=True),
    "every 2nd layer": _checkpointing("every_2"),
    "every 2nd layer fp32": _checkpointing("every_2", precision="fp32"),
    "every 3rd layer": _checkpointing("every_3"),
    "every 3rd layer qlora": _checkpointing("every_3", **QLORA),
    "every 2nd layer amp": _checkpointing("every_2", precision="amp_bf16"),
    "selective attention": _checkpointing("selective_attention", attention="eager"),
    "selective attention amp": _checkpointing("selective_attention", precision="amp_bf16"),
    "selective attention padded": _checkpointing("selective_attention", padding=True),
    "selective attention lora": _checkpointing("selective_attention", **LORA),
    "selective operators": _checkpointing("selective_op"),
    "selective operators lora": _checkpointing("selective_op", **LORA),
    "selective operators amp": _checkpointing("selective_op", precision="amp_bf16"),
    "selective operators eager": _checkpointing("selective_op", attention="eager"),
    "offloaded checkpoints": _checkpointing("offload"),
    "offloaded checkpoints amp": _checkpointing("offload", precision="amp_bf16"),
    "offloaded checkpoints qlora": _checkpointing("offload", **QLORA),
    "every 2nd layer reentrant offloaded": _checkpointing("every_2_reentrant_offload", **LORA),
    "saved tensors on the host": _checkpointing("save_on_cpu"),
    "saved tensors on the host amp": _checkpointing("save_on_cpu", precision="amp_bf16"),
    "saved tensors on the host lora": _checkpointing("save_on_cpu", **LORA),
    "saved tensors on the host padded": _checkpointing("save_on_cpu", padding=True),
    "flash 3": {"attention": "flash_attention_3"},
    "flash 3 amp": {"attention": "flash_attention_3", "precision": "amp_bf16"},
    "flash 3 padded checkpointed": _checkpointing(
        "full", attention="flash_attention_3", padding=True
    ),
    "flash 3 packed lora": {**LORA, "attention": "flash_attention_3", "packing": True},
    "flex": {"attention": "flex_attention"},
    "flex fp32 checkpointed": _checkpointing("full", attention="flex_attention", precision="fp32"),
    "flex softcapped": {"attention": "flex_attention"},
    "flex padded lora": {**LORA, "attention": "flex_attention", "padding": True},
    "flex packed": {"attention": "flex_attention", "packing": True},
    "sdpa math": {"attention": "sdpa_math"},
    "sdpa math padded": {"attention": "sdpa_math", "padding": True},
    "sdpa math amp": {"attention": "sdpa_math", "precision": "amp_bf16"},
    "sdpa math fp32 checkpointed": _checkpointing(
        "full", attention="sdpa_math", precision="fp32"
    ),
    "sdpa efficient": {"attention": "sdpa_efficient"},
    "sdpa efficient padded": {"attention": "sdpa_efficient", "padding": True},
    "sdpa efficient lora": {**LORA, "attention": "sdpa_efficient"},
    "sdpa efficient amp checkpointed": _checkpointing(
        "full", attention="sdpa_efficient", precision="amp_bf16"
    ),
    "sdpa flash": {"attention": "sdpa_flash"},
    "sdpa flash amp": {"attention": "sdpa_flash", "precision": "amp_bf16"},
    "sdpa flash qlora": _checkpointing("full", **QLORA, attention="sdpa_flash"),
    "packed": {"packing": True},
    "packed flash": {"packing": True, "attention": "flash_attention_2"},
    "packed flash checkpointed": _checkpointing(
        "full", packing=True, attention="flash_attention_2"
    ),
    "packed eager": {"packing": True, "attention": "eager"},
    "packed amp": {"packing": True, "precision": "amp_bf16", "seq_len": 500},
    "packed lora": {**LORA, "packing": True},
    "packed checkpointed": _checkpointing("full", packing=True),
    "packed accumulation": {"packing": True, "gradient_accumulation_steps": 3},
    "gradients set to zero": {"loop": {"set_to_none": False}},
    "gradients set to zero lora": {**LORA, "loop": {"set_to_none": False}},
    "gradients set to zero checkpointed": _checkpointing(
        "full", loop={"set_to_none": False}, precision="amp_bf16"
    ),
    "gradients set to zero accumulation": {
        "loop": {"set_to_none": False}, "gradient_accumulation_steps": 2,
    },
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "reentrant amp": "qwen2",
    "reentrant qlora": "gpt2",
    "reentrant padded": "gemma2",
    "every 2nd layer fp32": "gemma2",
    "every 3rd layer": "gemma3",
    "every 2nd layer amp": "opt",
    "selective attention amp": "gpt2",
    "selective attention padded": "qwen2",
    "selective operators amp": "qwen2",
    "selective operators eager": "gemma2",
    "offloaded checkpoints qlora": "gemma3",
    "offloaded checkpoints amp": "falcon",
    "saved tensors on the host amp": "qwen2",
    "saved tensors on the host padded": "gpt_neox",
    "gradients set to zero lora": "gpt2",
    "flash 3 amp": "llama-mha",
    "flash 3 padded checkpointed": "qwen3",
    "flex fp32 checkpointed": "gpt_neox",
    "flex softcapped": "gemma2",
    "flex padded lora": "gemma3",
    "flex packed": "mistral-window",
    "sdpa math padded": "qwen2",
    "sdpa math amp": "gpt2",
    "sdpa math fp32 checkpointed": "gpt_neox",
    "sdpa efficient": "llama-mha",
    "sdpa efficient lora": "gpt_neox",
    "sdpa efficient amp checkpointed": "opt",
    "sdpa flash amp": "qwen3",
    "packed flash checkpointed": "qwen2",
    "packed eager": "gemma2",
    "packed amp": "gpt2",
    "packed lora": "gemma3",
    "packed checkpointed": "gpt_neox",
}

FAST: Final = frozenset(
    {
        "reentrant",
        "every 2nd layer",
        "selective attention",
        "selective operators",
        "offloaded checkpoints",
        "saved tensors on the host",
        "gradients set to zero",
        "flash 3",
        "flex",
        "sdpa math",
        "sdpa efficient",
        "packed",
        "packed flash",
    }
)
