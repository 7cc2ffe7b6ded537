"""The pass with which SophiaG estimates the Hessian, in the order of events of its authors' script.

The names of a micro-batch die with it, as they do in a function of its own; that script has them at
the top level of its loop. The batches are those of the step before it.

Source: Liuhong99/Sophia, train_sophiag.py, behind `iter_num % hess_interval`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from profiler import trace

Phase = Callable[[str], None]


def backward(model: Any, inputs: dict[str, Any], phase: Phase, micro_batches: int) -> None:
    """Run one micro-batch: draw the labels from the logits, and run backward from their loss."""
    phase(trace.FORWARD)
    logits = model(**{name: each for name, each in inputs.items() if name != "labels"})["logits"]
    phase(trace.LOSS_FORWARD)
    samp_dist = torch.distributions.Categorical(logits=logits)
    y_sample = samp_dist.sample()
    loss = torch.nn.functional.cross_entropy(
        logits.view(-1, logits.size(-1)), y_sample.view(-1), ignore_index=-1
    )
    if micro_batches > 1:
        loss = loss / micro_batches
    phase(trace.BACKWARD)
    torch.autograd.backward(loss)
