"""What one project's script does: its optimizer, alone and in the recipe that it is known for."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LOWMEM: Final[Document] = {"optimizer": {"name": "lowmem_adafactor", "in_backward": True}}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}


def _trl(version: str, **changes: Any) -> Document:
    return {"software": {"framework": "trl", "version": version}, **changes}


RECIPES: Final[dict[str, Document]] = {
    "trl 0.27": _trl("0.27"),
    "trl 0.27 lora, bf16 weights": _trl(
        "0.27",
        precision="bf16",
        autocast="bf16",
        activation_checkpointing="none",
        method={"name": "lora", "r": 12},
    ),
    "trl 0.22": _trl("0.22"),
    "trl 0.22 accumulation, padded": _trl("0.22", padding=True, gradient_accumulation_steps=3),
    "trl 1.3": _trl("1.3"),
    "trl 1.3 one sequence": _trl("1.3", micro_batch_size=1, seq_len=2000),
    "trl 1.3 qlora": _trl(
        "1.3",
        quantization={"name": "nf4", "prepare_kbit": False},
        precision="bf16",
        autocast="bf16",
        method={"name": "lora", "r": 12, "adapter_dtype": "bfloat16"},
    ),
    "trl 1.3 without autocast": _trl("1.3", precision="bf16"),
    "lowmem adafactor": {**SHORT, "optimizer": "lowmem_adafactor"},
    "lowmem adafactor fp32": {**SHORT, "optimizer": "lowmem_adafactor", "precision": "fp32"},
    "lowmem adafactor in backward": {**SHORT, **LOWMEM},
    "lowmem recipe": {
        **LOWMEM,
        "method": {"name": "partial", "last_layers": 5},
        "autocast": "bf16",
        "padding": True,
        "activation_checkpointing": "full",
        "loss": "cut_cross_entropy",
    },
    "lowmem adafactor, gpt2": {**SHORT, **LOWMEM, "activation_checkpointing": "full"},
}
MODELS: Final[dict[str, str]] = {
    "trl 0.27 lora, bf16 weights": "qwen2",
    "trl 0.22 accumulation, padded": "gpt2",
    "trl 1.3 without autocast": "gemma2",
    "lowmem adafactor, gpt2": "gpt2",
}
FAST: Final = frozenset({"lowmem adafactor in backward", "trl 1.3"})
