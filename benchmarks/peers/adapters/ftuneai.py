"""`ftuneai`: its `Estimator`. Figures are GiB, though named GB.

A model that its own table lacks is looked up on the Hub; weights are in the format of the model's
configuration, gradients and activations in 16 bits, which leaves fp32 runs out.
"""

from __future__ import annotations

import os
from typing import Final

import ftuneai
from ftuneai import hub

from benchmarks.peers.case import Case

GIB: Final = 2**30
OPTIMIZERS: Final = {
    "adamw": "adamw",
    "adamw-8bit": "adam_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
QUANTIZATIONS: Final = {"nf4": "4bit", "nf4-dq": "4bit", "gptq-int4": "4bit", "gptq-int8": "8bit"}
ATTENTION: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})

# Its address is a constant; the stand-in takes its place.
hub.HF_API_BASE = os.environ["HF_ENDPOINT"]


def answer(case: Case) -> float:
    """Return the total, of which a fifth of the rest is overhead [bytes]."""
    case.only_methods("full", "lora", "qlora", "gptq-lora")
    case.only_optimizers(*OPTIMIZERS)
    case.only_checkpointing("none", "full")
    case.only_precisions("pure")
    case.only_plain_kernels()
    found = ftuneai.Estimator(
        model=case.model,
        method="lora" if case.method == "gptq-lora" else case.method,
        quantization=QUANTIZATIONS.get(case.base, "none"),
        batch_size=case.micro_batch_size,
        seq_length=case.seq_len,
        gradient_checkpointing=case.checkpointing == "full",
        optimizer=OPTIMIZERS[case.optimizer],
        lora_rank=case.rank or 16,
        lora_target=target(case),
        flash_attention=case.attention != "eager",
        sharding={"none": "none", "fsdp": "fsdp", "zero3": "zero_3"}[case.sharding],
        num_gpus=case.gpus,
    ).estimate_memory()
    return float(found.total_gb) * GIB


def target(case: Case) -> str:
    """Return the narrowest of its three sets of targets that holds the case's."""
    targets = frozenset(case.targets)
    if targets <= {"q_proj", "v_proj"}:
        return "attention"
    return "attention_all" if targets <= ATTENTION else "all_linear"
