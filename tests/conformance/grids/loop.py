"""What the training loop does around forward and backward."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.0}}
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 13}
OFFLOADS: Final[Document] = {"name": "torchao_cpu_offload", "offload_gradients": True}
OWN_LOSS: Final[Document] = {"own_loss": True}
FUSED: Final[Document] = {"optimizer": "adamw_torch_fused"}

RECIPES: Final[dict[str, Document]] = {
    "clipping, few tokens": {**SHORT, **FUSED, "loop": {"max_grad_norm": 0.3}},
    "clipping lora checkpointed": {
        **SHORT, **LORA, **FUSED, "activation_checkpointing": "full",
    },
    "clipping amp accumulation": {
        **SHORT, **FUSED, "precision": "amp_bf16", "gradient_accumulation_steps": 3,
    },
    "loss scaling fused, accumulation": {
        **SHORT, **FUSED, "precision": "amp_fp16", "gradient_accumulation_steps": 3,
    },
    "loss scaling without clipping": {
        **SHORT, "optimizer": "sgd", "precision": "amp_fp16", "loop": {"max_grad_norm": 0},
    },
    "loss scaling lora over fp16": {
        **LORA, "precision": "fp16", "autocast": "fp16", "activation_checkpointing": "full",
    },
    "tf32": {**SHORT, **FUSED, "precision": "tf32"},
    "average of weights": {**SHORT, **FUSED, "loop": {"ema": "cuda"}},
    "average of weights amp checkpointed": {
        **FUSED, "precision": "amp_bf16", "activation_checkpointing": "full",
        "loop": {"ema": "cuda"},
    },
    "average of weights lora": {**LORA, "loop": {"ema": "cuda"}},
    "average of weights, tied, accumulation": {
        **SHORT, **FUSED, "gradient_accumulation_steps": 2, "loop": {"ema": "cuda"},
    },
    "average of weights on the host": {**SHORT, **FUSED, "loop": {"ema": "cpu"}},
    "logits of 300 positions": {"loop": {"logits_to_keep": 300}},
    "logits of 300 positions amp": {"precision": "amp_bf16", "loop": {"logits_to_keep": 300}},
    "logits of 300 positions lora checkpointed": {
        **LORA, "autocast": "bf16", "activation_checkpointing": "full",
        "loop": {"logits_to_keep": 300},
    },
    "logits of 300 positions, one row": {
        "micro_batch_size": 1, "seq_len": 2000, "loop": {"logits_to_keep": 300},
    },
    "logits of 300 positions, capped": {
        "loop": {"logits_to_keep": 300}, "gradient_accumulation_steps": 2,
    },
    "loss of one's own": {"loop": OWN_LOSS},
    "loss of one's own amp": {**FUSED, "precision": "amp_bf16", "loop": OWN_LOSS},
    "loss of one's own lora checkpointed": {
        **LORA, "autocast": "bf16", "activation_checkpointing": "full", "loop": OWN_LOSS,
    },
    "loss of one's own, accumulation": {
        **FUSED, "precision": "amp_bf16", "gradient_accumulation_steps": 3, "loop": OWN_LOSS,
    },
    "loss of one's own, capped": {"loop": OWN_LOSS},
    "stochastic rounding": {
        **SHORT, "optimizer": {"name": "torchao_adamw", "bf16_stochastic_round": True},
    },
    "stochastic rounding 8-bit checkpointed": {
        **SHORT, "activation_checkpointing": "full",
        "optimizer": {"name": "adamw_torch_8bit", "bf16_stochastic_round": True},
    },
    "stochastic rounding lora": {
        **SHORT, **LORA, "optimizer": {"name": "torchao_adamw", "bf16_stochastic_round": True},
    },
    "stochastic rounding accumulation": {
        **SHORT, "gradient_accumulation_steps": 2,
        "optimizer": {"name": "adamw_torch_4bit", "bf16_stochastic_round": True},
    },
    "optimizer on the host": {**SHORT, "optimizer": "torchao_cpu_offload"},
    "optimizer on the host, long": {
        "activation_checkpointing": "full", "optimizer": "torchao_cpu_offload",
    },
    "optimizer on the host amp": {
        **SHORT, "optimizer": "torchao_cpu_offload", "precision": "amp_bf16",
    },
    "optimizer on the host accumulation": {
        **SHORT, "optimizer": "torchao_cpu_offload", "gradient_accumulation_steps": 2,
    },
    "optimizer on the host lora": {
        **SHORT, **LORA, "optimizer": {"name": "torchao_cpu_offload", "minimal_size": 2000},
    },
    "gradients on the host": {**SHORT, "optimizer": OFFLOADS},
    "gradients on the host, long": {
        "activation_checkpointing": "full", "optimizer": OFFLOADS,
    },
    "gradients on the host amp": {**SHORT, "optimizer": OFFLOADS, "precision": "amp_bf16"},
    "gradients on the host, tied": {
        **SHORT, "optimizer": OFFLOADS, "activation_checkpointing": "full",
    },
    "gradients on the host qlora": {
        **LORA, "optimizer": {**OFFLOADS, "minimal_size": 2000}, "quantization": {"name": "nf4"},
        "autocast": "bf16", "activation_checkpointing": "full",
    },
    "no clipping": {**SHORT, **FUSED, "loop": {"max_grad_norm": 0}},
}  # fmt: skip
MODELS: Final[dict[str, str]] = {
    "clipping amp accumulation": "gpt2",
    "loss of one's own, accumulation": "gpt2",
    "loss of one's own, capped": "gemma2",
    "loss scaling without clipping": "gpt2",
    "stochastic rounding 8-bit checkpointed": "gpt2",
    "stochastic rounding accumulation": "llama-tied",
    "optimizer on the host amp": "gpt2",
    "optimizer on the host accumulation": "llama-tied",
    "gradients on the host amp": "gpt2",
    "gradients on the host, tied": "llama-tied",
    "average of weights amp checkpointed": "gpt2",
    "average of weights, tied, accumulation": "llama-tied",
    "logits of 300 positions amp": "gpt2",
    "logits of 300 positions, capped": "gemma2",
}
FAST: Final = frozenset({"clipping amp accumulation", "gradients on the host, tied"})
