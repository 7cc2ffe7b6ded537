"""From a published row to a case, by rules that read the row's own fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, get_args

from benchmarks.accuracy.comparison import answers
from benchmarks.accuracy.published import Row
from benchmarks.accuracy.recipes import ALPACA, COPIES, longest_of_alpaca
from benchmarks.peers.case import CannotExpressError, Case, Precision, Sharding
from estimator.catalog import models

ALL_LINEAR: Final = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip

# A source's name of targets, as transformers' Llama names them. `output head` is left out: no
# peer can say it.
TARGETS: Final = {
    "query": ("q_proj",),
    "value": ("v_proj",),
    "value (fused qkv Linear)": ("v_proj",),
    "output_proj": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "output head": (),
    # Of Qwen and of santacoder: query, key and value in one matrix. fms-main names it beside the
    # four projections that its other models have.
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "DEFAULT": ("q_proj", "k_proj", "v_proj"),
    "ALL linear": ALL_LINEAR,
    "all-linear": ALL_LINEAR,
}

# The first words that match a row's `optimizer`. A paged AdamW has the states of AdamW.
OPTIMIZERS: Final = (
    ("adamw-8bit", r"8bit"),
    ("adamw-4bit", r"4bit"),
    ("adafactor", r"adafactor"),
    ("lomo", r"lomo"),
    ("sgd", r"sgd"),
    ("adamw", r"adam"),
)

# For a model whose longest sequence the catalogue leaves out: no peer may refuse for that.
LENGTH: Final = {"max_position_embeddings": 32_768}

SHARDINGS: Final = {"fsdp1": "fsdp", "fsdp2": "fsdp"}
KERNELS: Final = {"liger": "liger", "fused triton CE": "foak"}
ATTENTION: Final = {"flash2": "flash_attention_2", "eager": "eager"}


def cases(rows: tuple[Row, ...]) -> tuple[tuple[Case, ...], dict[str, str]]:
    """Return a case for each row, and for every other row why there is none."""
    found, missing = [], {}
    trainable = _trainable(rows)
    for row in rows:
        try:
            found.append(_case(row, trainable.get(row.id)))
        except CannotExpressError as error:
            missing[row.id] = str(error)
    return tuple(found), missing


def _case(row: Row, trainable: int | None) -> Case:
    name = COPIES.get(row.model, row.model).lower()
    known = {each.lower(): model for model in models() for each in (model.id, *model.aliases)}
    if name not in known:
        raise CannotExpressError(f"model not in our catalogue: {row.model}")
    length = seq_len(row)
    if length is None or row.micro_batch_size is None:
        raise CannotExpressError("micro-batch or length not stated")
    model, kind = known[name], SHARDINGS.get(row.parallelism["kind"], row.parallelism["kind"])
    sharding: Sharding = next(each for each in get_args(Sharding) if each == kind)
    loss = row.loss_impl or ""
    classifies = loss.startswith("sequence classification")
    return Case(
        id=row.id,
        model=model.id,
        config={**LENGTH, **model.config},
        parameters=model.parameters.computed,
        method=row.method,
        rank=row.method_detail.get("rank"),
        targets=targets(row),
        trainable=row.method_detail.get("trainable_params", trainable or _fused(row, model.config)),
        base=base(row),
        precision=precision(row),
        optimizer=optimizer(row),
        fused="fused" in (row.optimizer or ""),
        in_backward=row.optimizer_in_backward,
        micro_batch_size=row.micro_batch_size,
        seq_len=length,
        accumulation=row.grad_accum or 1,
        checkpointing=(row.activation_checkpointing or "none").split()[0],
        attention=ATTENTION.get(row.attention_impl or "", "sdpa"),
        kernels=next((name for start, name in KERNELS.items() if loss.startswith(start)), ""),
        sharding=sharding,
        gpus=int(row.parallelism["gpus"]),
        gpu=row.gpu,
        task="sequence-classification" if classifies else "causal-lm",
    )


def _trainable(rows: tuple[Row, ...]) -> dict[str, int]:
    """Return our counts of trainable parameters, as if every run were on one GPU."""
    # With a length, no orders of lengths are replayed, which takes long.
    alone = (
        replace(row, parallelism={"kind": "none", "gpus": 1}, seq_len=seq_len(row))
        for row in rows
        if row.method == "lora"
    )
    answered = answers(alone).answered
    return {each.row.id: each.result.parameters.trainable for each in answered}


def _fused(row: Row, config: Mapping[str, Any]) -> int | None:
    """Return LoRA's parameters on Qwen's c_attn, A [r, h] and B [3h, r] in every layer."""
    if row.method_detail.get("target_modules") != "c_attn":
        return None
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return int(layers * row.method_detail["rank"] * (hidden + 3 * hidden))


def seq_len(row: Row) -> int | None:
    """Return the length: its field, or the longest sample of the source's data set.

    One length is all that a peer takes; it is the longest of those that our answer is asked with.
    """
    if row.seq_len is None and (row.seq_mode or "").startswith(ALPACA):
        return longest_of_alpaca(row)
    return row.seq_len


def targets(row: Row) -> tuple[str, ...]:
    """Return LoRA's targets as transformers' Llama names them, each once."""
    named = row.method_detail.get("target_modules") or ()
    names = [named] if isinstance(named, str) else named
    return tuple(dict.fromkeys(each for name in names for each in TARGETS.get(name, (name,))))


def base(row: Row) -> str:
    """Return how the weights of the base are stored."""
    weights = row.weights_dtype or ""
    quantized = str(row.method_detail.get("quant") or weights)
    if "gptq" in quantized.lower():
        return "gptq-int8" if "int8" in quantized else "gptq-int4"
    if "nf4" in quantized.lower() or "int4 bnb" in quantized:
        # fms-acceleration and ms-swift quantize the scales too; see accuracy/recipes.py.
        doubled = row.source_group in ("fms-main", "ms-swift")
        return "nf4-dq" if doubled or re.search("dq|double", quantized) else "nf4"
    if weights.startswith("fp32"):
        return "fp32"
    return "fp16" if weights.startswith("fp16") else "bf16"


def precision(row: Row) -> Precision:
    """Return how the number formats of weights, gradients and computation lie together."""
    if (row.weights_dtype or "").startswith("fp32"):
        return "fp32" if row.precision == "fp32" else "amp"
    return "master" if "DeepSpeed" in (row.precision or "") else "pure"


def optimizer(row: Row) -> str:
    """Return the optimizer's kind."""
    text = (row.optimizer or "").lower()
    return next(name for name, pattern in OPTIMIZERS if re.search(pattern, text))
