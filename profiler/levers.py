"""The settings that the validation matrix combines, and what cannot be combined.

Sizes are such that a step takes about a second on a data-centre card, and a run fits in 79 GiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Final

Document = Mapping[str, Any]
Value = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of a lever: what it writes into the request, and the packages that it needs."""

    document: Document
    libraries: tuple[str, ...] = ()


def _settings(documents: Mapping[str, Document]) -> dict[str, Setting]:
    return {name: Setting(each) for name, each in documents.items()}


def _small(**config: Any) -> Document:
    return {"model": {"config": config}}


# Families with sizes of their own. Those of odd shape are our own configurations.
_MODELS: Final[dict[str, Document]] = {
    "tinyllama-1.1b": {"model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"},
    "llama-3.1-8b": {"model": "meta-llama/Llama-3.1-8B"},
    "qwen2.5-0.5b": {"model": "Qwen/Qwen2.5-0.5B"},
    "gpt2-medium": {"model": "openai-community/gpt2-medium"},
    "gemma-3-1b": {"model": "google/gemma-3-1b-pt"},
    "pythia-1b": {"model": "EleutherAI/pythia-1b"},
    "llama-3.2-1b": {"model": "meta-llama/Llama-3.2-1B"},
    "qwen3-0.6b": {"model": "Qwen/Qwen3-0.6B"},
    "mistral-7b": {"model": "mistralai/Mistral-7B-v0.3"},
    "opt-1.3b": {"model": "facebook/opt-1.3b"},
    "bloom-560m": {"model": "bigscience/bloom-560m"},
    "gemma-2-2b": {"model": "google/gemma-2-2b"},
    "qwen2.5-7b": {"model": "Qwen/Qwen2.5-7B"},
    "mistral, window": _small(
        model_type="mistral", hidden_size=2048, intermediate_size=7168, num_hidden_layers=12,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, sliding_window=700,
        tie_word_embeddings=False,
    ),
    "phi3, fused products": _small(
        model_type="phi3", hidden_size=1920, intermediate_size=5120, num_hidden_layers=14,
        num_attention_heads=20, num_key_value_heads=10, vocab_size=32064, pad_token_id=0,
        tie_word_embeddings=False,
    ),
    "starcoder2": _small(
        model_type="starcoder2", hidden_size=1536, intermediate_size=6144, num_hidden_layers=16,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=49152, tie_word_embeddings=True,
    ),
    "falcon, grouped": _small(
        model_type="falcon", hidden_size=2048, num_hidden_layers=12, num_attention_heads=32,
        num_kv_heads=8, vocab_size=65024, new_decoder_architecture=True, parallel_attn=True,
        bias=False, alibi=False,
    ),
    "llama, odd sizes": _small(
        model_type="llama", hidden_size=1848, intermediate_size=5004, num_hidden_layers=13,
        num_attention_heads=21, num_key_value_heads=7, vocab_size=50021, tie_word_embeddings=False,
    ),
}  # fmt: skip

_LORA: Final = {"name": "lora", "r": 16, "lora_dropout": 0.0}
_LORA_DROPOUT: Final = {
    "name": "lora", "r": 64, "lora_dropout": 0.05, "target_modules": "all-linear",
}  # fmt: skip
_PEFT: Final = ("peft",)
_BITS: Final = ("bitsandbytes", "peft")

_METHODS: Final[dict[str, Setting]] = {
    "full": Setting({"method": "full"}),
    "lora": Setting({"method": _LORA}, _PEFT),
    "qlora": Setting({"method": _LORA_DROPOUT, "quantization": {"name": "nf4"}}, _BITS),
    "lora dropout": Setting({"method": _LORA_DROPOUT}, _PEFT),
    "last layers": Setting({"method": {"name": "partial", "last_layers": 2, "norms": True}}),
    "dora": Setting({"method": {**_LORA, "use_dora": True}}, _PEFT),
    "lora over int8": Setting({"method": _LORA, "quantization": {"name": "int8"}}, _BITS),
    "ia3": Setting({"method": "ia3"}, _PEFT),
    "prompt tuning": Setting({"method": "prompt_tuning"}, _PEFT),
    "lora of the base's type": Setting(
        {"method": {**_LORA, "r": 8, "adapter_dtype": "base"}}, _PEFT
    ),
}

_PRECISIONS: Final = _settings(
    {
        "bf16": {"precision": "bf16"},
        "amp_bf16": {"precision": "amp_bf16"},
        "autocast": {"precision": "bf16", "autocast": "bf16"},
        "fp32": {"precision": "fp32"},
        "master_bf16": {"precision": "master_bf16"},
        "fp16": {"precision": "fp16"},
    }
)
_BNB: Final = ("bitsandbytes",)
_OPTIMIZERS: Final[dict[str, Setting]] = {
    "adamw fused": Setting({"optimizer": {"name": "adamw", "implementation": "fused"}}),
    "adamw foreach": Setting({"optimizer": {"name": "adamw", "implementation": "foreach"}}),
    "adamw 8-bit": Setting({"optimizer": {"name": "adamw_8bit"}}, _BNB),
    "sgd": Setting({"optimizer": {"name": "sgd"}}),
    "adafactor": Setting({"optimizer": {"name": "adafactor"}}),
    "adamw single": Setting({"optimizer": {"name": "adamw", "implementation": "single"}}),
    "paged adamw 8-bit": Setting({"optimizer": {"name": "paged_adamw_8bit"}}, _BNB),
    "sgd with momentum": Setting({"optimizer": {"name": "sgd", "momentum": 0.9}}),
    "adamw in backward": Setting(
        {"optimizer": {"name": "adamw", "implementation": "foreach", "in_backward": True}}
    ),
    "rmsprop": Setting({"optimizer": {"name": "rmsprop"}}),
}
_CHECKPOINTING: Final = {
    name: Setting({"activation_checkpointing": name})
    for name in ("none", "full", "full_reentrant", "every_2", "selective_op", "offload")
}
_ATTENTION: Final = {
    name: Setting({"attention": name})
    for name in ("sdpa", "eager", "sdpa_efficient", "sdpa_flash", "sdpa_cudnn", "sdpa_math")
}
_LOSSES: Final[dict[str, Setting]] = {
    "standard": Setting({"loss": "standard"}),
    "fused_linear": Setting({"loss": "fused_linear"}, ("liger_kernel",)),
    "chunked": Setting({"loss": "chunked"}, ("trl",)),
    "cut_cross_entropy": Setting({"loss": "cut_cross_entropy"}, ("cut_cross_entropy",)),
}
_BATCHES: Final = _settings(
    {"plain": {}, "padding": {"padding": True}, "packing": {"packing": True}}
)
_LOOPS: Final = _settings(
    {
        "trainer": {},
        "accumulation": {"gradient_accumulation_steps": 4},
        "outputs kept": {"loop": {"keep_outputs": True}},
        "gradients set to zero": {"loop": {"set_to_none": False}},
        "not clipped": {"loop": {"max_grad_norm": 0.0}},
        "neftune": {"loop": {"neftune_noise_alpha": 5.0}},
        "label smoothing": {"loop": {"label_smoothing_factor": 0.1}},
        "few logits": {"loop": {"logits_to_keep": 64}},
    }
)
_SHAPES: Final = {
    f"{rows}x{length}": Setting({"micro_batch_size": rows, "seq_len": length})
    for rows, length in (
        (2, 1024), (1, 4096), (8, 512), (3, 1000), (1, 512), (4, 1024), (1, 3072), (2, 4096),
    )
}  # fmt: skip

LEVERS: Final[dict[str, dict[str, Setting]]] = {
    "model": {name: Setting(each) for name, each in _MODELS.items()},
    "method": _METHODS,
    "precision": _PRECISIONS,
    "optimizer": _OPTIMIZERS,
    "checkpointing": _CHECKPOINTING,
    "attention": _ATTENTION,
    "loss": _LOSSES,
    "batch": _BATCHES,
    "loop": _LOOPS,
    "shape": _SHAPES,
}
"""What is varied; the first value of each is what a case has where nothing else is said."""

# What people run; they come first, and the rows behind them cover what these leave.
ANCHORS: Final[dict[str, Mapping[str, str]]] = {
    "full fine-tuning in bf16": {"checkpointing": "full"},
    "full fine-tuning under autocast over fp32 weights": {"precision": "amp_bf16"},
    "LoRA of an 8B model": {
        "model": "llama-3.1-8b", "method": "lora", "checkpointing": "full",
    },
    "QLoRA of an 8B model": {
        "model": "llama-3.1-8b", "method": "qlora", "precision": "autocast",
        "optimizer": "paged adamw 8-bit", "checkpointing": "full",
    },
    "a large vocabulary": {"model": "gemma-3-1b", "shape": "1x4096"},
    "a large vocabulary, logits kept": {
        "model": "qwen2.5-0.5b", "loop": "outputs kept", "shape": "4x1024",
    },
}  # fmt: skip

_LARGE: Final = ("llama-3.1-8b", "mistral-7b", "qwen2.5-7b")
_MIDDLE: Final = ("gemma-2-2b",)
_LIGER: Final = (
    "tinyllama-1.1b", "llama-3.1-8b", "qwen2.5-0.5b", "gemma-3-1b", "llama-3.2-1b", "qwen3-0.6b",
    "mistral-7b", "gemma-2-2b", "qwen2.5-7b", "mistral, window", "llama, odd sizes",
)  # fmt: skip
_GROUPED: Final = (
    "tinyllama-1.1b", "qwen2.5-0.5b", "gemma-3-1b", "llama-3.2-1b", "qwen3-0.6b", "qwen2.5-7b",
    "llama-3.1-8b", "mistral-7b", "mistral, window", "phi3, fused products", "starcoder2",
    "llama, odd sizes",
)  # fmt: skip
_WITHOUT_SDPA: Final = ("bloom-560m", "gemma-2-2b")
_PACKED: Final = ("qlora", "lora over int8")
_ONE_KERNEL: Final = ("sdpa_efficient", "sdpa_flash", "sdpa_cudnn", "sdpa_math")
_LONG: Final = ("1x4096", "1x3072", "2x4096")


def _others(lever: str, *names: str) -> tuple[str, ...]:
    return tuple(each for each in LEVERS[lever] if each not in names)


def _rules() -> Iterator[tuple[str, str, Iterable[str], str, Iterable[str]]]:
    """Yield the reason, and two sets of values of which none of one goes with one of the other."""
    slow, masks = "it takes seconds a step", "the kernel takes no mask"
    scores, table = "every layer keeps its scores", "its table of positions is too short"
    fused, own = ("fused_linear", "chunked", "cut_cross_entropy"), "it has a loss of its own"
    yield "trained whole, it does not fit", "model", _LARGE, "method", ("full",)
    yield slow, "model", _LARGE, "precision", ("fp32", "amp_bf16", "master_bf16")
    yield slow, "model", (*_LARGE, *_MIDDLE), "shape", ("2x4096",)
    yield slow, "model", _MIDDLE, "precision", ("fp32",)
    yield slow, "precision", ("fp32",), "shape", ("1x4096", "2x4096")
    yield scores, "attention", ("eager", "sdpa_math"), "shape", _LONG
    yield scores, "model", _WITHOUT_SDPA, "shape", _LONG
    yield table, "model", ("gpt2-medium",), "shape", ("2x1024", "4x1024", *_LONG)
    yield table, "model", ("opt-1.3b",), "shape", _LONG
    yield "transformers runs eager attention", "model", _WITHOUT_SDPA, "attention", _ONE_KERNEL
    yield "it prepares attention itself", "model", ("falcon, grouped",), "attention", _ONE_KERNEL
    yield "half precision only", "attention", ("sdpa_flash", "sdpa_cudnn"), "precision", ("fp32",)
    yield masks, "attention", ("sdpa_flash",), "batch", ("padding", "packing")
    yield masks, "attention", ("sdpa_flash",), "model", ("mistral, window", "gemma-3-1b")
    yield "PEFT has no targets", "model", ("phi3, fused products", "starcoder2"), "method", ("ia3",)
    yield masks, "attention", ("sdpa_cudnn",), "batch", ("padding", "packing")
    yield "heads of 256", "attention", ("sdpa_cudnn",), "model", ("gemma-3-1b", "pythia-1b")
    yield "no model has both", "attention", ("sdpa_efficient",), "loss", ("fused_linear",)
    yield (
        "the kernel takes as many heads of keys as of queries",
        "attention", ("sdpa_efficient",), "model", _GROUPED,
    )  # fmt: skip
    yield "Liger has none", "model", _others("model", *_LIGER), "loss", ("fused_linear",)
    yield "half precision only", "loss", ("cut_cross_entropy",), "precision", ("fp32", "amp_bf16")
    yield "its hidden states are fp32", "loss", ("cut_cross_entropy",), "method", _PACKED
    yield own, "loss", fused, "loop", ("label smoothing", "few logits")
    yield (
        "it takes no position_ids",
        "model", ("opt-1.3b", "bloom-560m", "falcon, grouped"), "batch", ("packing",),
    )  # fmt: skip
    yield (
        "packed weights are computed in half precision",
        "method", _PACKED, "precision", _others("precision", "bf16", "autocast", "fp16"),
    )  # fmt: skip
    yield (
        "labels get longer than logits",
        "method", ("prompt tuning",), "loop", ("label smoothing", "few logits"),
    )  # fmt: skip
    yield "not sourced", "batch", ("packing",), "loop", ("few logits",)
    in_backward = ("adamw in backward",)
    yield "not sourced", "optimizer", in_backward, "precision", ("master_bf16",)
    yield (
        "no gradient is left",
        "optimizer", in_backward, "loop", ("accumulation", "gradients set to zero"),
    )  # fmt: skip


@lru_cache(maxsize=1)
def impossible_pairs() -> frozenset[frozenset[Value]]:
    """Return the pairs of values that no row may have."""
    return frozenset(
        frozenset(((lever, name), (other, its)))
        for _, lever, names, other, others in _rules()
        for name, its in product(names, others)
    )


def anchor(settings: Mapping[str, str]) -> dict[str, str]:
    """Return a value for each lever: those given, and of the others the first."""
    return {lever: settings.get(lever, next(iter(values))) for lever, values in LEVERS.items()}


def libraries(values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the packages that a row needs beside torch, transformers and accelerate."""
    chosen = (LEVERS[lever][name].libraries for lever, name in values.items())
    return tuple(dict.fromkeys(name for each in chosen for name in each))


def request(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the request document of a row; sections that several values write are joined."""
    found: dict[str, Any] = {}
    for lever, name in values.items():
        for key, value in LEVERS[lever][name].document.items():
            section = isinstance(value, Mapping)
            found[key] = {**found.get(key, {}), **value} if section else value
    return found
