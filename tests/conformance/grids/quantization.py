"""How frozen weights are stored and multiplied: widths, formats, and what they combine with."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.05}}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
INT8: Final[Document] = {**LORA, "quantization": {"name": "int8"}, "autocast": "bf16"}
TORCHAO: Final[Document] = {**LORA, "quantization": {"name": "torchao_int8"}, "autocast": "bf16"}
BF16_ADAPTERS: Final[Document] = {
    "method": {"name": "lora", "r": 12, "lora_dropout": 0.05, "adapter_dtype": "bfloat16"},
}
MEGATRON: Final[Document] = {"precision": "megatron_bf16", "optimizer": "adamw_torch"}


def _qlora(**quantization: Any) -> Document:
    """Return QLoRA under autocast with some settings of its quantization."""
    return {**LORA, "quantization": {"name": "nf4", **quantization}, "autocast": "bf16"}


RECIPES: Final[dict[str, Document]] = {
    "int8": INT8,
    "int8 checkpointed": {**INT8, **CHECKPOINTED},
    "int8 without autocast": {**INT8, "autocast": None},
    "int8 without k-bit preparation": {
        **INT8, "quantization": {"name": "int8", "prepare_kbit": False},
    },
    "int8 without either": {
        **INT8, "autocast": None, "quantization": {"name": "int8", "prepare_kbit": False},
    },
    "int8 fp16": {
        **INT8, "precision": "fp16", "autocast": "fp16",
        "quantization": {"name": "int8", "prepare_kbit": False},
    },
    "int8 without outlier search": {**INT8, "quantization": {"name": "int8", "threshold": 0.0}},
    "int8 accumulation": {**INT8, "gradient_accumulation_steps": 4},
    "int8 gpt2": {**INT8, **CHECKPOINTED},
    "int8 opt eager": {**INT8, "attention": "eager"},
    "int8 gemma2 padded": {**INT8, "padding": True},
    "qlora bf16 storage": _qlora(quant_storage="bfloat16"),
    "qlora fp32 storage checkpointed": {**_qlora(quant_storage="float32"), **CHECKPOINTED},
    "qlora fp16 storage, adapters in its type": {
        **_qlora(quant_storage="float16"), **CHECKPOINTED,
        "method": {"name": "lora", "r": 12, "adapter_dtype": "base"},
    },
    "qlora fp32 compute": _qlora(compute_dtype="float32"),
    "qlora fp32 compute checkpointed": {**_qlora(compute_dtype="float32"), **CHECKPOINTED},
    "qlora fp32 compute unprepared": {
        **_qlora(compute_dtype="float32", prepare_kbit=False), "autocast": None,
    },
    "qlora fp16 compute gpt2": _qlora(compute_dtype="float16"),
    "qlora skipped modules": _qlora(skip_modules=["lm_head", "down_proj", "o_proj"]),
    "qlora skipped modules checkpointed": {
        **_qlora(skip_modules=["lm_head", "gate_proj"]), **CHECKPOINTED,
    },
    "int8 skipped modules": {
        **INT8, "quantization": {"name": "int8", "skip_modules": ["lm_head", "q_proj"]},
    },
    "torchao int8": TORCHAO,
    "torchao int8 checkpointed": {**TORCHAO, **CHECKPOINTED},
    "torchao int8 without autocast": {**TORCHAO, "autocast": None},
    "torchao int8 fp32": {**TORCHAO, "precision": "fp32", "autocast": None},
    "torchao int8 fp32 autocast": {**TORCHAO, "precision": "fp32"},
    "torchao int8 unprepared": {
        **TORCHAO, "autocast": None,
        "quantization": {"name": "torchao_int8", "prepare_kbit": False},
    },
    "torchao int8 base adapters": {
        **TORCHAO, **CHECKPOINTED, "method": {"name": "lora", "r": 12, "adapter_dtype": "base"},
    },
    "torchao int8 opt padded": {**TORCHAO, "padding": True},
    "torchao int8 skipped modules": {
        **TORCHAO,
        "quantization": {"name": "torchao_int8", "skip_modules": ["lm_head", "up_proj"]},
    },
    "qlora bf16 adapters": {**_qlora(), **BF16_ADAPTERS},
    "qlora bf16 adapters checkpointed": {**_qlora(), **CHECKPOINTED, **BF16_ADAPTERS},
    "qlora bf16 adapters unprepared": {
        **_qlora(prepare_kbit=False), **BF16_ADAPTERS, "autocast": None,
    },
    "int8 bf16 adapters gpt2": {**INT8, **BF16_ADAPTERS},
    "megatron": MEGATRON,
    "megatron checkpointed": {**MEGATRON, **CHECKPOINTED},
    "megatron accumulation": {**MEGATRON, "gradient_accumulation_steps": 4},
    "megatron autocast gpt2": {**MEGATRON, "autocast": "bf16"},
    "megatron fused gemma": {**MEGATRON, "optimizer": "adamw_torch_fused"},
    "megatron short": {**MEGATRON, "micro_batch_size": 1, "seq_len": 130},
    "megatron lora": {**LORA, "precision": "megatron_bf16"},
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "int8 gpt2": "gpt2",
    "int8 bf16 adapters gpt2": "gpt2",
    "megatron autocast gpt2": "gpt2",
    "megatron fused gemma": "gemma",
    "torchao int8 opt padded": "opt",
    "int8 opt eager": "opt",
    "int8 gemma2 padded": "gemma2",
    "qlora fp16 compute gpt2": "gpt2",
}
FAST: Final = frozenset({"int8", "qlora fp32 compute", "torchao int8", "megatron short"})
