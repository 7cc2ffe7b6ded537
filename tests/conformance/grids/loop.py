"""What the training loop does around forward and backward."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.0}}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 13}
FUSED: Final[Document] = {"optimizer": "adamw_torch_fused"}

RECIPES: Final[dict[str, Document]] = {
    "clipping, few tokens": {**SHORT, **FUSED, "loop": {"max_grad_norm": 0.3}},
    "clipping lora checkpointed": {
        **SHORT, **LORA, **FUSED, "activation_checkpointing": "full",
    },
    "clipping amp accumulation": {
        **SHORT, **FUSED, "precision": "amp_bf16", "gradient_accumulation_steps": 3,
    },
    "no clipping": {**SHORT, **FUSED, "loop": {"max_grad_norm": 0}},
}  # fmt: skip
MODELS: Final[dict[str, str]] = {"clipping amp accumulation": "gpt2"}
FAST: Final = frozenset({"clipping amp accumulation"})
