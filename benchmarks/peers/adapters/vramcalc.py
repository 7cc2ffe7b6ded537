"""`vramcalc`: its Python interface. Its total is the allocator's, its overhead comes on top.

LoRA is on the four projections of attention, with fp32 adapters; it takes the rank alone.
"""

from __future__ import annotations

from typing import Final

import vramcalc
from vramcalc.arch import SUPPORTED_MODEL_TYPES

from benchmarks.peers.case import CannotExpressError, Case

ATTENTION: Final = {"flash_attention_2": "flash", "sdpa": "sdpa", "eager": "eager"}


def answer(case: Case) -> tuple[int, int]:
    """Return what must fit on the device, and the total without its overhead [bytes]."""
    case.only_one_gpu()
    case.only_methods("full", "lora")
    case.only_optimizers("adamw", "sgd")
    case.only_checkpointing("none", "full")
    case.only_precisions("fp32", "amp", "pure")
    case.only_plain_kernels()
    if case.config["model_type"] not in SUPPORTED_MODEL_TYPES:
        raise CannotExpressError(f"it refuses the model: {case.config['model_type']}")
    found = vramcalc.estimate(
        dict(case.config),
        mode="train",
        dtype={"fp32": "fp32", "amp": "bf16"}.get(case.precision, case.base),
        batch=case.micro_batch_size,
        seq_len=case.seq_len,
        lora_rank=case.rank if case.method == "lora" else None,
        grad_checkpoint=case.checkpointing == "full",
        optimizer=case.optimizer,
        precision="amp" if case.precision == "amp" else "pure",
        attn_impl=ATTENTION[case.attention],
    )
    return found.total + found.overhead, found.total
