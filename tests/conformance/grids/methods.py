"""Methods outside PEFT: partial training, bottleneck adapters, ReFT, training without backward."""

from __future__ import annotations

from typing import Any, Final

CHECKPOINTED: Final[dict[str, Any]] = {"activation_checkpointing": "full"}


def _partial(**knobs: Any) -> dict[str, Any]:
    return {"method": {"name": "partial", **knobs}}


_LAST: Final = _partial(last_layers=2)
_HEAD: Final = _partial(modules=["lm_head"])
_BITFIT: Final = {"method": "bitfit"}
_NORMS: Final = _partial(norms=True)
_TABLES: Final = _partial(embeddings=True)
_QUERIES: Final = _partial(modules=["q_proj"])
# Every weight gets a gradient, and the optimizer has some of them.
_LEFT: Final = _partial(last_layers=2, freeze_others=False)
_LAYERS_ALONE: Final = _partial(modules=["self_attn", "mlp"], norms=True, freeze_others=False)
_HOULSBY: Final = {"method": "houlsby_adapter"}
_HOULSBY32: Final = {"method": {"name": "houlsby_adapter", "adapter_dtype": "float32"}}
_REFT: Final = {"method": {"name": "loreft", "r": 4, "positions": "f5+l5"}}
_MEZO: Final = {"method": "mezo"}
_PFEIFFER: Final = {"method": {"name": "pfeiffer_adapter", "reduction_factor": 9.0}}

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "last layers": _LAST,
    "last layers checkpointed": {**_LAST, **CHECKPOINTED},
    "last layers fp32": {**_LAST, "precision": "fp32"},
    "last layers amp": {**_LAST, "precision": "amp_bf16"},
    "last layers padded": {**_LAST, "padding": True},
    "last layers accumulation": {**_LAST, "gradient_accumulation_steps": 4},
    "last layers, alternating": _LAST,
    "last layers, tied": _LAST,
    "last layers and head": _partial(last_layers=1, modules=["lm_head"]),
    "last layers and embeddings": _partial(last_layers=1, embeddings=True),
    "last layers, opt": _LAST,
    "last layers, attention only": _partial(last_layers=3, modules=["self_attn"]),
    "last layers, queries fp32": {
        **_partial(last_layers=3, modules=["q_proj"]), "precision": "fp32",
    },
    "others not frozen": _LEFT,
    "others not frozen, checkpointed": {**_LEFT, **CHECKPOINTED},
    "others not frozen, amp": {**_LEFT, "precision": "amp_bf16"},
    "others not frozen, accumulation": {**_LEFT, "gradient_accumulation_steps": 4},
    "others not frozen, set to zero": {**_LEFT, "loop": {"set_to_none": False}},
    "others not frozen, short, clipping off": {
        **_LEFT, "seq_len": 64, "loop": {"max_grad_norm": 0.0},
    },
    "others not frozen, short": {**_LEFT, "seq_len": 64},
    "others not frozen, in backward": {
        **_LEFT, "optimizer": {"name": "adamw", "in_backward": True},
    },
    "others not frozen, master copies": {**_LEFT, "precision": "master_bf16", "seq_len": 64},
    "others not frozen, loss scaling": {**_LEFT, "precision": "amp_fp16", "seq_len": 64},
    "others not frozen, tied": {**_LEFT, "seq_len": 64},
    "others not frozen, gpt2": {**_partial(biases=True, freeze_others=False), "precision": "fp32"},
    "others not frozen, gpt2 sgd checkpointed": {
        **_partial(modules=["attn"], freeze_others=False), **CHECKPOINTED,
        "optimizer": {"name": "sgd"}, "precision": "amp_bf16",
    },
    "layers alone": _LAYERS_ALONE,
    "layers alone, tied amp foreach checkpointed": {
        **_partial(last_layers=4, freeze_others=False), **CHECKPOINTED, "precision": "amp_bf16",
        "optimizer": {"name": "adam", "implementation": "foreach"}, "padding": True,
        "loop": {"keep_outputs": True},
    },
    "layers alone, tied amp adafactor": {
        **_LAYERS_ALONE, **CHECKPOINTED, "precision": "amp_bf16",
        "optimizer": {"name": "adafactor"}, "seq_len": 64,
    },
    "layers alone, chunked loss": {**_LAYERS_ALONE, "loss": "chunked"},
    "layers alone, fused loss accumulation": {
        **_LAYERS_ALONE, "loss": "fused_linear", "gradient_accumulation_steps": 2,
    },
    "others not frozen, paged 8-bit": {**_LEFT, "optimizer": {"name": "paged_adamw_8bit"}},
    "head alone": _partial(modules=["lm_head"], freeze_others=False),
    "head only": _HEAD,
    "head only, tied": _HEAD,
    "head only fp32": {**_HEAD, "precision": "fp32"},
    "head only checkpointed": {**_HEAD, **CHECKPOINTED},
    "head only autocast": {**_HEAD, "autocast": "bf16"},
    "bitfit": _BITFIT,
    "bitfit, opt": _BITFIT,
    "bitfit checkpointed": {**_BITFIT, **CHECKPOINTED},
    "bitfit amp": {**_BITFIT, "precision": "amp_bf16"},
    "bitfit, last layers": {"method": {"name": "bitfit", "last_layers": 1}},
    "norms only": _NORMS,
    "norms only, gemma": _NORMS,
    "norms only fp32": {**_NORMS, "precision": "fp32"},
    "norms only checkpointed": {**_NORMS, **CHECKPOINTED},
    "norms only, bloom": _NORMS,
    "embeddings only": _TABLES,
    "embeddings only, tied": _TABLES,
    "embeddings only, gpt2": _TABLES,
    "embeddings only checkpointed": {**_TABLES, **CHECKPOINTED},
    "queries only": _QUERIES,
    "queries only checkpointed": {**_QUERIES, **CHECKPOINTED},
    "queries only autocast": {**_QUERIES, "autocast": "bf16"},
    "mlp only, qwen3": _partial(modules=["mlp"]),
    "houlsby": _HOULSBY,
    "houlsby checkpointed": {**_HOULSBY, **CHECKPOINTED},
    "houlsby autocast": {**_HOULSBY32, "autocast": "bf16"},
    "houlsby autocast checkpointed": {**_HOULSBY32, "autocast": "bf16", **CHECKPOINTED},
    "houlsby fp32": {**_HOULSBY, "precision": "fp32"},
    "houlsby amp": {**_HOULSBY32, "precision": "amp_bf16"},
    "houlsby, gpt2": _HOULSBY,
    "houlsby, gpt2 amp": {**_HOULSBY, "precision": "amp_bf16"},
    "houlsby, mistral padded": {**_HOULSBY, "padding": True},
    "houlsby, gelu_new": {
        "method": {"name": "houlsby_adapter", "non_linearity": "gelu_new", "reduction_factor": 2.0},
    },
    "houlsby nf4": {
        **_HOULSBY, "quantization": "nf4", "autocast": "bf16", **CHECKPOINTED,
    },
    "pfeiffer": _PFEIFFER,
    "pfeiffer checkpointed": {**_PFEIFFER, **CHECKPOINTED},
    "pfeiffer autocast": {**_PFEIFFER, "autocast": "bf16"},
    "pfeiffer accumulation": {**_PFEIFFER, "gradient_accumulation_steps": 4},
    "pfeiffer, gpt2": _PFEIFFER,
    "pfeiffer, gpt2 checkpointed": {**_PFEIFFER, **CHECKPOINTED},
    "pfeiffer, mistral": _PFEIFFER,
    "loreft": _REFT,
    "loreft shared": {
        "method": {"name": "loreft", "r": 5, "positions": "f7+l7", "share_weights": True},
    },
    "loreft checkpointed": {**_REFT, **CHECKPOINTED},
    "loreft fp32": {**_REFT, "precision": "fp32"},
    "loreft autocast": {**_REFT, "autocast": "bf16"},
    "loreft amp": {**_REFT, "precision": "amp_bf16"},
    "loreft padded": {**_REFT, "padding": True},
    "loreft accumulation": {**_REFT, "gradient_accumulation_steps": 4},
    "loreft, some layers": {"method": {"name": "loreft", "r": 4, "layers": [1, 3]}},
    "loreft, some layers checkpointed": {
        "method": {"name": "loreft", "r": 4, "layers": [1, 3]}, **CHECKPOINTED,
    },
    "loreft, gemma": _REFT,
    "loreft, gpt2": {"method": {"name": "loreft", "dropout": 0.05}},
    "loreft nf4": {**_REFT, "quantization": "nf4", "autocast": "bf16", **CHECKPOINTED},
    "mezo": _MEZO,
    "mezo fp32": {**_MEZO, "precision": "fp32"},
    "mezo amp": {**_MEZO, "precision": "amp_bf16"},
    "mezo eager": {**_MEZO, "attention": "eager"},
    "mezo padded": {**_MEZO, "padding": True},
    "mezo, gpt2": _MEZO,
    "mezo, gemma2": _MEZO,
    "mezo, short": {**_MEZO, "micro_batch_size": 1, "seq_len": 130},
    "pfeiffer nf4": {
        **_PFEIFFER, "quantization": {"name": "nf4", "prepare_kbit": False},
    },
}  # fmt: skip

MODELS: Final[dict[str, str]] = {
    "last layers, alternating": "gemma3",
    "last layers, tied": "llama-tied",
    "last layers, opt": "opt",
    "others not frozen, tied": "llama-tied",
    "others not frozen, gpt2": "gpt2",
    "others not frozen, gpt2 sgd checkpointed": "gpt2",
    "layers alone, tied amp foreach checkpointed": "llama-tied",
    "layers alone, tied amp adafactor": "qwen2",
    "head only, tied": "qwen2",
    "bitfit": "gpt2",
    "bitfit, opt": "opt",
    "bitfit checkpointed": "qwen2",
    "bitfit amp": "gpt_neox",
    "bitfit, last layers": "bloom",
    "norms only, gemma": "gemma",
    "norms only, bloom": "bloom",
    "embeddings only, tied": "starcoder2",
    "embeddings only, gpt2": "gpt2",
    "mlp only, qwen3": "qwen3",
    "loreft, gemma": "gemma",
    "mezo, gpt2": "gpt2",
    "mezo, gemma2": "gemma2",
    "loreft, gpt2": "gpt2",
    "houlsby, gpt2": "gpt2",
    "houlsby, gpt2 amp": "gpt2",
    "houlsby, mistral padded": "mistral-window",
    "pfeiffer, gpt2": "gpt2",
    "pfeiffer, gpt2 checkpointed": "gpt2",
    "pfeiffer, mistral": "mistral-window",
}

FAST: Final = frozenset(
    {
        "last layers", "others not frozen, tied", "bitfit", "houlsby", "pfeiffer, gpt2", "loreft",
        "mezo",
    }
)  # fmt: skip
