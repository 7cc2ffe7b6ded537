"""Which modules PEFT's methods take where the request names none: by model type.

Source: peft, utils/constants.py, TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING and its like.
"""

from __future__ import annotations

from typing import Final

from estimator.errors import InvalidRequestError

Table = dict[str, tuple[str, ...]]

_QUERY_VALUE: Final = ("q_proj", "v_proj")
_FUSED: Final = ("query_key_value",)
_LLAMA_NORMS: Final = ("input_layernorm", "post_attention_layernorm", "norm")
_SANDWICH_NORMS: Final = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "norm",
)  # fmt: skip
_FALCON_NORMS: Final = ("input_layernorm", "post_attention_layernorm", "ln_f")

# LoHa, LoKr, OFT and BOFT alike.
ATTENTION: Final[Table] = {
    "llama": _QUERY_VALUE, "mistral": _QUERY_VALUE, "qwen2": _QUERY_VALUE, "qwen3": _QUERY_VALUE,
    "gemma": _QUERY_VALUE, "gemma2": _QUERY_VALUE, "gemma3_text": _QUERY_VALUE,
    "opt": _QUERY_VALUE, "gpt2": ("c_attn",), "gpt_neox": _FUSED, "falcon": _FUSED,
    "bloom": _FUSED,
}  # fmt: skip
# AdaLoRA and VB-LoRA alike.
ADALORA: Final[Table] = {
    "llama": _QUERY_VALUE, "qwen2": _QUERY_VALUE, "qwen3": _QUERY_VALUE, "gemma": _QUERY_VALUE,
    "gemma2": _QUERY_VALUE, "gemma3_text": _QUERY_VALUE, "gpt2": ("c_attn",), "gpt_neox": _FUSED,
    "bloom": _FUSED, "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}  # fmt: skip
FOURIERFT: Final[Table] = {**ATTENTION, "gpt2": ("mlp.c_proj",)}
IA3: Final[Table] = {
    "llama": ("k_proj", "v_proj", "down_proj"), "mistral": ("k_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"), "qwen3": ("q_proj", "v_proj", "down_proj"),
    "gemma": ("q_proj", "v_proj", "down_proj"), "gemma2": ("q_proj", "v_proj", "down_proj"),
    "gemma3_text": ("q_proj", "v_proj", "down_proj"), "opt": ("q_proj", "k_proj", "fc2"),
    "gpt2": ("c_attn", "mlp.c_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
}  # fmt: skip
IA3_FEEDFORWARD: Final[Table] = {
    "llama": ("down_proj",), "mistral": ("down_proj",), "qwen2": ("down_proj",),
    "qwen3": ("down_proj",), "gemma": ("down_proj",), "gemma2": ("down_proj",),
    "gemma3_text": ("down_proj",), "opt": ("fc2",), "gpt2": ("mlp.c_proj",),
    "gpt_neox": ("dense_4h_to_h",), "falcon": ("dense_4h_to_h",),
    "bloom": ("mlp.dense_4h_to_h",),
}  # fmt: skip
LN_TUNING: Final[Table] = {
    "llama": _LLAMA_NORMS, "mistral": _LLAMA_NORMS, "gemma": _LLAMA_NORMS,
    "qwen2": ("post_attention_layernorm",), "qwen3": ("post_attention_layernorm",),
    "gemma2": _SANDWICH_NORMS, "gemma3_text": _SANDWICH_NORMS, "gpt2": ("ln_1", "ln_2", "ln_f"),
    "falcon": _FALCON_NORMS, "bloom": _FALCON_NORMS,
}  # fmt: skip


def targets(
    given: tuple[str, ...] | str, table: Table, model_type: str, field: str = "target_modules"
) -> tuple[str, ...] | str:
    """Return the modules that were named, else those that PEFT takes for this type of model.

    Raises:
        InvalidRequestError: none were named, and PEFT has no default for this type.
    """
    if given:
        return given
    if model_type not in table:
        raise InvalidRequestError(
            f"PEFT has no default {field} for {model_type} models here; name them"
        )
    return table[model_type]
