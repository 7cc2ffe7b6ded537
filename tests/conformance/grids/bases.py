"""LoRA over bases that come packed or are packed by other libraries than bitsandbytes."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.05}}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}


def _over(name: str, *changes: Document, **quantization: Any) -> Document:
    """Return LoRA under autocast over one format, with what is unusual about the case."""
    document: Document = {**LORA, "quantization": {"name": name, **quantization}}
    for each in ({"autocast": "bf16"}, *changes):
        document.update(each)
    return document


PLAIN: Final[Document] = {"autocast": None}
FP16: Final[Document] = {"precision": "fp16", "autocast": "fp16"}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}
LONGER: Final[Document] = {"micro_batch_size": 1, "seq_len": 1100}
FP32: Final[Document] = {"precision": "fp32", "autocast": None}
BASE: Final[Document] = {"method": {"name": "lora", "r": 12, "adapter_dtype": "base"}}

RECIPES: Final[dict[str, Document]] = {
    "gptq": _over("gptq"),
    "gptq checkpointed": _over("gptq", CHECKPOINTED),
    "gptq without autocast": _over("gptq", PLAIN),
    "gptq fp16": _over("gptq", FP16, CHECKPOINTED),
    "gptq fp32": _over("gptq", FP32),
    "gptq 8 bits, one group": _over("gptq", CHECKPOINTED, bits=8, group_size=-1),
    "gptq 2 bits, groups of 32": _over("gptq", PLAIN, CHECKPOINTED, bits=2, group_size=32),
    "gptq base adapters": _over("gptq", BASE, CHECKPOINTED),
    "gptq accumulation": _over("gptq", {"gradient_accumulation_steps": 4}),
    "gptq qwen2 padded": _over("gptq", {"padding": True}),
    "gptq gpt2": _over("gptq"),
    "gptq gpt2 checkpointed": _over("gptq", PLAIN, CHECKPOINTED),
    "gptq opt eager": _over("gptq", FP16, {"attention": "eager"}),
    "gptq short": _over("gptq", CHECKPOINTED, SHORT),
    "awq": _over("awq", FP16),
    "awq checkpointed": _over("awq", FP16, CHECKPOINTED),
    "awq bf16 autocast": _over("awq"),
    "awq without autocast": _over("awq", PLAIN),
    "awq unprepared": _over("awq", FP16, PLAIN, CHECKPOINTED, prepare_kbit=False),
    "awq unprepared, bf16 autocast": _over("awq", prepare_kbit=False, group_size=64),
    "awq fp32": _over("awq", FP32, CHECKPOINTED),
    "awq base adapters": _over("awq", FP16, BASE, group_size=-1),
    "awq accumulation": _over("awq", FP16, {"gradient_accumulation_steps": 4}),
    "awq skipped modules": _over("awq", FP16, skip_modules=["down_proj"]),
    "awq qwen2 padded": _over("awq", FP16, {"padding": True}),
    "awq opt": _over("awq", CHECKPOINTED, group_size=64),
    "awq few tokens": _over("awq", FP16, SHORT),
    "hqq": _over("hqq"),
    "hqq checkpointed": _over("hqq", CHECKPOINTED),
    "hqq without autocast": _over("hqq", PLAIN),
    "hqq fp16": _over("hqq", FP16, CHECKPOINTED),
    "hqq fp32": _over("hqq", FP32, CHECKPOINTED),
    "hqq 8 bits, axis 0": _over("hqq", CHECKPOINTED, bits=8, axis=0, group_size=128),
    "hqq 3 bits": _over("hqq", SHORT, bits=3),
    "hqq 2 bits": _over("hqq", PLAIN, SHORT, CHECKPOINTED, bits=2, group_size=32),
    "hqq 1 bit, axis 0": _over("hqq", SHORT, bits=1, axis=0),
    "hqq base adapters": _over("hqq", BASE, CHECKPOINTED),
    "hqq unprepared": _over("hqq", PLAIN, CHECKPOINTED, prepare_kbit=False),
    "hqq accumulation": _over("hqq", {"gradient_accumulation_steps": 4}),
    "hqq qwen2 padded": _over("hqq", {"padding": True}),
    "hqq opt": _over("hqq", CHECKPOINTED),
    "hqq short": _over("hqq", CHECKPOINTED, SHORT),
    "gptq selective_op": _over("gptq", LONGER, {"activation_checkpointing": "selective_op"}),
    "awq selective_op": _over("awq", LONGER, {"activation_checkpointing": "selective_op"}),
    "hqq selective_op": _over("hqq", LONGER, {"activation_checkpointing": "selective_op"}),
    "gptq save_on_cpu": _over("gptq", LONGER, {"activation_checkpointing": "save_on_cpu"}),
    "hqq liger": _over("hqq", LONGER, {"kernels": ["liger"]}),
    "awq liger": _over("awq", FP16, LONGER, {"kernels": ["liger"]}),
    "awq 1024 tokens": _over("awq", CHECKPOINTED, {"micro_batch_size": 1, "seq_len": 1024}),
}

_FAMILIES: Final = ("gpt2", "qwen2", "opt", "gemma")
MODELS: Final[dict[str, str]] = {
    recipe: next(
        (family for family in _FAMILIES if family in recipe),
        "llama-mha" if recipe.startswith("awq") else "llama-tied",
    )
    for recipe in RECIPES
}
FAST: Final = frozenset({"gptq short", "awq few tokens", "hqq short"})
