"""16 bytes a parameter: weights and gradients in 16 bits, fp32 weights and two moments of Adam.

Source: Rajbhandari and others, ZeRO (arXiv:1910.02054), section 3.1; divided by the GPUs that
share them as in stage 3 (section 5.3).
"""

from __future__ import annotations

from benchmarks.peers.case import Case

BYTES = 2 + 2 + 4 + 4 + 4


def answer(case: Case) -> int:
    """Return the model states of one GPU [bytes]."""
    case.only_methods("full")
    case.only_optimizers("adamw")
    return BYTES * case.parameters // case.gpus
