"""What transformers fills in where a `config.json` leaves an optional field out.

One row for each `model_type`; a test compares every value with the configuration class.
Source: hf-modeling, the configuration classes.
"""

from __future__ import annotations

from typing import Any, Final

DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "bloom": {
        "tie_word_embeddings": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_residual_connection_post_layernorm": False,
        "slow_but_exact": False,
        "pretraining_tp": 1,
    },
    "falcon": {
        "tie_word_embeddings": True,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "activation": "gelu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "llama": {"tie_word_embeddings": False},
    "mistral": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "gemma": {"tie_word_embeddings": True, "num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
    "gpt2": {
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    "gpt_neox": {
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_parallel_residual": True,
    },
    "opt": {
        "tie_word_embeddings": True,
        "activation_function": "relu",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    "phi3": {"tie_word_embeddings": False},
    "starcoder2": {"tie_word_embeddings": True, "num_key_value_heads": 2, "use_bias": True},
    "qwen2": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
