"""Optimizers: alone over short sequences, where their step is the peak, and in combinations."""

from __future__ import annotations

from typing import Any, Final

Document = dict[str, Any]

# One short sequence: gradients, states and temporaries outweigh activations.
SHORT: Final[Document] = {"micro_batch_size": 1, "seq_len": 130}
CHECKPOINTED: Final[Document] = {"activation_checkpointing": "full"}
LORA: Final[Document] = {"method": {"name": "lora", "r": 12, "lora_dropout": 0.05}}

QLORA: Final[Document] = {
    **LORA, "quantization": {"name": "nf4"}, "autocast": "bf16",
}  # fmt: skip

LAST_LAYERS: Final[Document] = {"method": {"name": "partial", "last_layers": 2}}


def _asked(optimizer: str, *others: Document, **knobs: Any) -> Document:
    document: Document = {"optimizer": {"name": optimizer, **knobs}}
    for other in others:
        document.update(other)
    return document


def _in_backward(optimizer: str, *others: Document, **knobs: Any) -> Document:
    return _asked(optimizer, *others, in_backward=True, **knobs)


_FP32: Final[Document] = {"precision": "fp32"}
_FP16: Final[Document] = {"precision": "fp16"}
_BITSANDBYTES: Final[tuple[Any, ...]] = (
    ("adamw_32bit", ""),
    ("adamw_32bit", ", gpt2", {"precision": "amp_bf16"}),
    ("adamw_32bit", " lora", LORA),
    ("paged_adamw_32bit", ""),
    ("paged_adamw_32bit", " lora checkpointed", LORA, CHECKPOINTED),
    ("paged_adamw_32bit", " fp32", _FP32),
    ("ademamix", ""),
    ("ademamix", " lora", LORA),
    ("ademamix", ", gpt2", _FP32),
    ("ademamix_8bit", ""),
    ("ademamix_8bit", ", tied", CHECKPOINTED),
    ("ademamix_8bit", " fp32", _FP32),
    ("paged_ademamix_8bit", ""),
    ("paged_ademamix_32bit", ""),
    ("lion_8bit", ""),
    ("lion_8bit", ", gpt2", CHECKPOINTED),
    ("lion_8bit", " amp", {"precision": "amp_bf16"}),
    ("lion_32bit", ""),
    ("lion_32bit", " lora", LORA),
    ("paged_lion_8bit", ""),
    ("paged_lion_8bit", " lora fp32", LORA, _FP32),
    ("paged_lion_32bit", ""),
    ("rmsprop_bnb_8bit", " fp16", _FP16),
    ("rmsprop_bnb_8bit", ", tied", _FP32),
    ("rmsprop_bnb_32bit", " fp16 checkpointed", CHECKPOINTED, _FP16),
    ("lamb_32bit", ""),
    ("lamb_32bit", ", tied", CHECKPOINTED, _FP32),
    ("lamb_32bit", " lora", LORA),
    ("lamb_32bit", " master_bf16", {"precision": "master_bf16"}),
    ("lamb_32bit", " amp", {"precision": "amp_bf16"}),
    ("adagrad_8bit", " fp16", _FP16),
    ("adagrad_32bit", " amp", {"precision": "amp_bf16"}),
)

RECIPES: Final[dict[str, Document]] = {
    # -- the optimizer in backward -------------------------------------------------------------
    "adamw in backward": _in_backward("adamw", SHORT),
    "adamw in backward, long": _in_backward("adamw", CHECKPOINTED),
    "adamw foreach in backward checkpointed": _in_backward(
        "adamw", SHORT, CHECKPOINTED, implementation="foreach"
    ),
    "adamw single in backward, tied": _in_backward("adamw", SHORT, implementation="single"),
    "sgd in backward checkpointed": _in_backward("sgd", SHORT, CHECKPOINTED),
    "adafactor in backward": _in_backward("adafactor", SHORT),
    "adafactor in backward fp32 checkpointed, tied": _in_backward(
        "adafactor", SHORT, CHECKPOINTED, {"precision": "fp32"}
    ),
    "adafactor in backward, gpt2": _in_backward("adafactor", SHORT),
    "adamw 8-bit in backward checkpointed": _in_backward("adamw_8bit", SHORT, CHECKPOINTED),
    "torch adafactor in backward amp": _in_backward(
        "torch_adafactor", SHORT, {"precision": "amp_bf16"}
    ),
    "adamw in backward, lora": _in_backward("adamw", LORA, CHECKPOINTED),
    # -- fused backward ------------------------------------------------------------------------
    "lomo": _asked("lomo", SHORT),
    "lomo fp32 checkpointed, tied": _asked("lomo", SHORT, CHECKPOINTED, {"precision": "fp32"}),
    "lomo amp, gpt2": _asked("lomo", SHORT, {"precision": "amp_bf16"}),
    "lomo, long": _asked("lomo", CHECKPOINTED),
    "lomo lora": _asked("lomo", SHORT, LORA),
    "adalomo": _asked("adalomo", SHORT),
    "adalomo fp32 checkpointed, tied": _asked(
        "adalomo", SHORT, CHECKPOINTED, {"precision": "fp32"}
    ),
    "adalomo, gpt2": _asked("adalomo", SHORT),
    "adalomo eager, long": _asked("adalomo", CHECKPOINTED, {"attention": "eager"}),
    # -- small libraries -----------------------------------------------------------------------
    "lion": _asked("lion", SHORT),
    "lion fp32, gpt2": _asked("lion", SHORT, _FP32),
    "lion lora": _asked("lion", SHORT, LORA),
    "lion in backward checkpointed": _in_backward("lion", SHORT, CHECKPOINTED),
    "sophia": _asked("sophia", SHORT),
    "sophia, long": _asked("sophia"),
    "sophia checkpointed, tied": _asked("sophia", CHECKPOINTED),
    "sophia amp, gpt2": _asked("sophia", {"precision": "amp_bf16"}),
    "sophia fp32 checkpointed, gpt2": _asked("sophia", CHECKPOINTED, _FP32),
    "sophia lora": _asked("sophia", LORA),
    "sophia qlora checkpointed": _asked("sophia", QLORA, CHECKPOINTED),
    "sophia of micro-batches": _asked(
        "sophia", {"gradient_accumulation_steps": 4, "padding": True, "attention": "eager"}
    ),
    "sophia single row, many layers": _asked("sophia", {"micro_batch_size": 1}, CHECKPOINTED),
    "schedule-free adamw": _asked("schedule_free_adamw", SHORT),
    "schedule-free adamw amp, tied": _asked(
        "schedule_free_adamw", SHORT, {"precision": "amp_bf16"}
    ),
    "schedule-free adamw checkpointed": _asked("schedule_free_adamw", SHORT, CHECKPOINTED),
    "schedule-free adamw lora": _asked("schedule_free_adamw", SHORT, LORA),
    "schedule-free radam": _asked("schedule_free_radam", SHORT),
    "schedule-free sgd": _asked("schedule_free_sgd", SHORT),
    "schedule-free sgd fp32, gpt2": _asked("schedule_free_sgd", SHORT, _FP32),
    # -- Muon, with AdamW beside it ------------------------------------------------------------
    "muon": _asked("muon", SHORT),
    "muon fused fp32, tied": _asked("muon", SHORT, _FP32, implementation="fused"),
    "muon fused amp checkpointed": _asked(
        "muon", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}, implementation="fused"
    ),
    "muon fused, many layers": _asked("muon", SHORT, implementation="fused"),
    "muon single, gpt2": _asked("muon", SHORT, implementation="single"),
    "muon fused lora": _asked("muon", SHORT, LORA, implementation="fused"),
    "muon fused qlora checkpointed": _asked("muon", SHORT, QLORA, CHECKPOINTED),
    "muon in backward checkpointed": _in_backward("muon", SHORT, CHECKPOINTED),
    "muon accumulation": _asked("muon", SHORT, {"gradient_accumulation_steps": 4}),
    "muon single in backward": _in_backward("muon", SHORT, implementation="single"),
    "muon, saved head": _asked(
        "muon", SHORT, {"method": {"name": "lora", "r": 8, "modules_to_save": ["lm_head"]}}
    ),
    "muon of some layers": _asked("muon", SHORT, LAST_LAYERS),
    "muon, gains and tables": _asked("muon", SHORT),
    "muon fp16": _asked("muon", SHORT, {"precision": "fp16"}, implementation="fused"),
    # -- what the Trainer takes from torch-optimi and grokadamw --------------------------------
    "stable adamw": _asked("stable_adamw", SHORT),
    "stable adamw fp32, tied": _asked("stable_adamw", SHORT, _FP32),
    "stable adamw foreach": _asked("stable_adamw", SHORT, implementation="foreach"),
    "stable adamw single, gpt2": _asked("stable_adamw", SHORT, _FP32, implementation="single"),
    "stable adamw amp checkpointed": _asked(
        "stable_adamw", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}
    ),
    "stable adamw qlora": _asked("stable_adamw", SHORT, QLORA),
    "stable adamw single in backward": _in_backward(
        "stable_adamw", SHORT, CHECKPOINTED, implementation="single"
    ),
    "stable adamw in backward": _in_backward("stable_adamw", SHORT, CHECKPOINTED),
    "stable adamw megatron_bf16": _asked("stable_adamw", SHORT, {"precision": "megatron_bf16"}),
    "stable adamw foreach amp accumulation": _asked(
        "stable_adamw",
        SHORT,
        {"precision": "amp_bf16", "gradient_accumulation_steps": 3},
        implementation="foreach",
    ),
    "stable adamw foreach master_bf16": _asked(
        "stable_adamw", SHORT, {"precision": "master_bf16"}, implementation="foreach"
    ),
    "grokadamw": _asked("grokadamw", SHORT),
    "grokadamw fp32, gpt2": _asked("grokadamw", SHORT, _FP32),
    "grokadamw lora amp": _asked("grokadamw", SHORT, LORA, {"precision": "amp_bf16"}),
    "grokadamw in backward, tied": _in_backward("grokadamw", SHORT, CHECKPOINTED),
    "grokadamw master_bf16": _asked("grokadamw", SHORT, {"precision": "master_bf16"}),
    "grokadamw accumulation": _asked("grokadamw", SHORT, {"gradient_accumulation_steps": 4}),
    # -- pytorch_optimizer ---------------------------------------------------------------------
    "lamb": _asked("lamb", SHORT),
    "lamb fp32, tied": _asked("lamb", SHORT, _FP32),
    "lamb single, gpt2": _asked("lamb", SHORT, _FP32, implementation="single"),
    "lamb amp checkpointed": _asked("lamb", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}),
    "lamb qlora": _asked("lamb", SHORT, QLORA),
    "lamb in backward": _in_backward("lamb", SHORT, CHECKPOINTED),
    "lamb megatron_bf16": _asked("lamb", SHORT, {"precision": "megatron_bf16"}),
    "lamb master_bf16": _asked("lamb", SHORT, {"precision": "master_bf16"}),
    "soap": _asked("soap", SHORT),
    "soap fp32, tied": _asked("soap", SHORT, _FP32),
    "soap of small sides, gpt2": _asked("soap", SHORT, CHECKPOINTED, max_precondition_dim=2000),
    "soap amp": _asked("soap", SHORT, {"precision": "amp_bf16"}),
    "soap lora": _asked("soap", SHORT, LORA),
    "soap in backward": _in_backward("soap", SHORT, CHECKPOINTED),
    "soap megatron_bf16": _asked("soap", SHORT, {"precision": "megatron_bf16"}),
    "soap, gains and tables": _asked("soap", SHORT),
    "soap master_bf16": _asked("soap", SHORT, {"precision": "master_bf16"}),
    "shampoo lora": _asked("shampoo", SHORT, LORA),
    "shampoo lora fp32, gpt2": _asked("shampoo", SHORT, LORA, _FP32),
    "shampoo, tied": _asked("shampoo", SHORT),
    "shampoo in backward, tied": _in_backward("shampoo", SHORT, CHECKPOINTED),
    "shampoo of some layers master_bf16": _asked(
        "shampoo",
        SHORT,
        {"precision": "master_bf16", **LAST_LAYERS},
    ),
    # -- Adam-mini -----------------------------------------------------------------------------
    "adam-mini": _asked("adam_mini", SHORT),
    "adam-mini fp32, tied": _asked("adam_mini", SHORT, _FP32),
    "adam-mini amp checkpointed, gpt2": _asked(
        "adam_mini", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}
    ),
    "adam-mini in backward": _in_backward("adam_mini", SHORT, CHECKPOINTED),
    "adam-mini, fused projections": _asked("adam_mini", SHORT),
    "adam-mini, one key head": _asked("adam_mini", SHORT),
    "adam-mini, heads wider than hidden": _asked("adam_mini", SHORT),
    "adam-mini, vectors named as matrices": _asked("adam_mini", SHORT),
    "adam-mini lora": _asked("adam_mini", SHORT, LORA),
    "adam-mini accumulation": _asked("adam_mini", SHORT, {"gradient_accumulation_steps": 4}),
    # -- torchao: the states are torchao's, the compiled step allocates nothing ------------------
    "torchao 8-bit": _asked("adamw_torch_8bit", SHORT),
    "torchao 8-bit fp32, gpt2": _asked("adamw_torch_8bit", SHORT, _FP32),
    "torchao 8-bit amp checkpointed": _asked(
        "adamw_torch_8bit", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}
    ),
    "torchao 4-bit": _asked("adamw_torch_4bit", SHORT),
    "torchao 4-bit, tied": _asked("adamw_torch_4bit", SHORT, _FP32),
    "torchao 4-bit in backward": _in_backward("adamw_torch_4bit", SHORT, CHECKPOINTED),
    "torchao fp8": _asked("adamw_torch_fp8", SHORT),
    "torchao fp8 lora": _asked("adamw_torch_fp8", SHORT, LORA),
    # -- torch ---------------------------------------------------------------------------------
    "adamw amsgrad": _asked("adamw", SHORT, amsgrad=True),
    "adam amsgrad single": _asked("adam", SHORT, amsgrad=True, implementation="single"),
    "adamw amsgrad foreach master_bf16": _asked(
        "adamw", SHORT, {"precision": "master_bf16"}, amsgrad=True, implementation="foreach"
    ),
    "sgd nesterov single": _asked(
        "sgd", SHORT, momentum=0.9, nesterov=True, implementation="single"
    ),
    "nadam": _asked("nadam", SHORT),
    "nadam single checkpointed": _asked("nadam", SHORT, CHECKPOINTED, implementation="single"),
    "nadam fp32, tied": _asked("nadam", SHORT, {"precision": "fp32"}),
    "nadam lora": _asked("nadam", SHORT, LORA),
    "radam": _asked("radam", SHORT),
    "radam single": _asked("radam", SHORT, implementation="single"),
    "radam amp, gpt2": _asked("radam", SHORT, {"precision": "amp_bf16"}),
    "radam in backward": _in_backward("radam", SHORT, implementation="single"),
    "rmsprop": _asked("rmsprop", SHORT),
    "rmsprop centered momentum single": _asked(
        "rmsprop", SHORT, centered=True, momentum=0.9, implementation="single"
    ),
    "rmsprop centered amp": _asked("rmsprop", SHORT, {"precision": "amp_bf16"}, centered=True),
    "rmsprop in backward checkpointed": _in_backward("rmsprop", SHORT, CHECKPOINTED),
    "adagrad": _asked("adagrad", SHORT),
    "adagrad fused": _asked("adagrad", SHORT, implementation="fused"),
    "adagrad single, tied": _asked("adagrad", SHORT, implementation="single"),
    "adagrad lora fp32": _asked("adagrad", SHORT, LORA, {"precision": "fp32"}),
    "torch adafactor": _asked("torch_adafactor", SHORT),
    "torch adafactor foreach": _asked("torch_adafactor", SHORT, implementation="foreach"),
    "torch adafactor fp32, gpt2": _asked("torch_adafactor", SHORT, {"precision": "fp32"}),
    # -- fp32 master copies: without temporaries, the peak is when the last gradient is copied -----
    "adamw fused master_bf16": _asked("adamw", SHORT, {"precision": "master_bf16"}),
    "adamw fused master_bf16 checkpointed, tied": _asked(
        "adamw", SHORT, CHECKPOINTED, {"precision": "master_bf16"}
    ),
    "sgd master_bf16, gpt2": _asked("sgd", SHORT, {"precision": "master_bf16"}),
    "bitsandbytes lion_8bit master_bf16": _asked("lion_8bit", SHORT, {"precision": "master_bf16"}),
    # -- bitsandbytes --------------------------------------------------------------------------
    **{
        f"bitsandbytes {name}{suffix}": _asked(name, SHORT, *others)
        for name, suffix, *others in _BITSANDBYTES
    },
    "bitsandbytes lars_32bit fp32": _asked("lars_32bit", SHORT, _FP32, momentum=0.9),
    "bitsandbytes lars_32bit amp checkpointed, gpt2": _asked(
        "lars_32bit", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}, momentum=0.9
    ),
    "bitsandbytes lars_32bit fp32 in backward": _in_backward(
        "lars_32bit", SHORT, CHECKPOINTED, _FP32, momentum=0.9
    ),
    "bitsandbytes lamb_32bit in backward": _in_backward("lamb_32bit", SHORT, CHECKPOINTED),
    "bitsandbytes lars_32bit fp16": _asked("lars_32bit", SHORT, _FP16, momentum=0.9),
    "bitsandbytes sgd_8bit fp16": _asked("sgd_8bit", SHORT, _FP16, momentum=0.9),
    "bitsandbytes sgd_32bit lora": _asked("sgd_32bit", SHORT, LORA, momentum=0.9),
    # -- Adafactor of transformers -------------------------------------------------------------
    "adafactor with momentum": _asked("adafactor", SHORT, beta1=0.9),
    "adafactor with momentum fp32, tied": _asked(
        "adafactor", SHORT, {"precision": "fp32"}, beta1=0.9
    ),
    "adafactor with momentum amp checkpointed": _asked(
        "adafactor", SHORT, CHECKPOINTED, {"precision": "amp_bf16"}, beta1=0.9
    ),
}

MODELS: Final[dict[str, str]] = {
    "muon, gains and tables": "bloom",
    "soap, gains and tables": "bloom",
    "adam-mini, fused projections": "phi3",
    "adam-mini, one key head": "falcon",
    "shampoo lora fp32, gpt2": "gpt2",
    "shampoo, tied": "llama-tied",
    "shampoo in backward, tied": "llama-tied",
    "adam-mini fp32, tied": "llama-tied",
    "adam-mini amp checkpointed, gpt2": "gpt2",
    "adam-mini, heads wider than hidden": "qwen3",
    "adam-mini, vectors named as matrices": "gpt_neox",
    "lamb fp32, tied": "llama-tied",
    "lamb single, gpt2": "gpt2",
    "soap fp32, tied": "llama-tied",
    "soap of small sides, gpt2": "gpt2",
    "stable adamw fp32, tied": "llama-tied",
    "stable adamw single, gpt2": "gpt2",
    "grokadamw fp32, gpt2": "gpt2",
    "grokadamw in backward, tied": "llama-tied",
    "bitsandbytes lamb_32bit, tied": "llama-tied",
    "bitsandbytes lars_32bit amp checkpointed, gpt2": "gpt2",
    "muon fused fp32, tied": "llama-tied",
    "muon single, gpt2": "gpt2",
    "muon fused, many layers": "gemma3",
    "adamw single in backward, tied": "llama-tied",
    "adafactor in backward fp32 checkpointed, tied": "llama-tied",
    "adafactor in backward, gpt2": "gpt2",
    "torch adafactor in backward amp": "qwen2",
    "torchao 8-bit fp32, gpt2": "gpt2",
    "torchao 4-bit, tied": "llama-tied",
    "adamw fused master_bf16 checkpointed, tied": "llama-tied",
    "sgd master_bf16, gpt2": "gpt2",
    "lion fp32, gpt2": "gpt2",
    "sophia checkpointed, tied": "llama-tied",
    "sophia amp, gpt2": "gpt2",
    "sophia fp32 checkpointed, gpt2": "gpt2",
    "sophia single row, many layers": "gemma3",
    "schedule-free adamw amp, tied": "llama-tied",
    "schedule-free sgd fp32, gpt2": "gpt2",
    "lomo fp32 checkpointed, tied": "llama-tied",
    "lomo amp, gpt2": "gpt2",
    "adalomo fp32 checkpointed, tied": "llama-tied",
    "adalomo, gpt2": "gpt2",
    "nadam fp32, tied": "llama-tied",
    "bitsandbytes adamw_32bit, gpt2": "gpt2",
    "bitsandbytes ademamix, gpt2": "gpt2",
    "bitsandbytes ademamix_8bit, tied": "llama-tied",
    "bitsandbytes lion_8bit, gpt2": "gpt2",
    "bitsandbytes rmsprop_bnb_8bit, tied": "llama-tied",
    "radam amp, gpt2": "gpt2",
    "adagrad single, tied": "llama-tied",
    "torch adafactor fp32, gpt2": "gpt2",
    "adafactor with momentum fp32, tied": "llama-tied",
}

FAST: Final = frozenset(
    {
        "sophia checkpointed, tied",
        "adamw single in backward, tied",
        "lomo",
        "bitsandbytes ademamix_8bit, tied",
        "radam single",
        "muon fp16",
        "soap lora",
        "torch adafactor in backward amp",
    }
)
