"""20 bytes a parameter: the same with gradients in 16 and in 32 bits.

Source: DeepSpeed 0.19.8, deepspeed/runtime/zero/stage_1_and_2.py, lines 4029-4031: 2 for weights
and 18 for gradients, fp32 weights and moments, on one GPU.
"""

from __future__ import annotations

from benchmarks.peers.case import Case

BYTES = 2 + 2 + 4 + 4 + 8


def answer(case: Case) -> int:
    """Return the model states of one GPU [bytes]."""
    case.only_methods("full")
    case.only_optimizers("adamw")
    return BYTES * case.parameters // case.gpus
