"""`llm-analysis`: `train`, for the model as it reads it from a configuration.

Fully trained models in 16 bits only. Without a master copy, gradients and states are said to be
16-bit numbers. Its memory of gradients has the width of the master weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from llm_analysis.analysis import train

from benchmarks.peers.case import Case

TOTAL: Final = "(weight+op_state+grad+act)_memory_per_gpu"
CHECKPOINTING: Final = {"none": 0, "selective": 1, "full": 2}
MOMENTS: Final = {"adamw": 2, "sgd": 0}


def answer(case: Case) -> float:
    """Return the sum for one GPU [bytes]."""
    case.only_in_transformers()
    case.only_methods("full")
    case.only_optimizers(*MOMENTS)
    case.only_precisions("amp", "pure", "master")
    case.only_plain_kernels()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(case.config)), encoding="utf-8")
        found = train(
            model_name=folder,
            gpu_name="mi250x-128gb",  # its largest: it refuses what does not fit
            log_level="ERROR",
            batch_size_per_gpu=case.micro_batch_size,
            gradient_accumulation_steps=case.accumulation,
            seq_len=case.seq_len,
            activation_recomputation=CHECKPOINTING[case.checkpointing],
            ds_zero=0 if case.sharding == "none" else 3,
            dp_size=case.gpus,
            flash_attn=case.attention != "eager",
            **states(case),
        )
    return float(found[TOTAL])


def states(case: Case) -> dict[str, Any]:
    """Return the widths of master weights and of the optimizer's other states [bytes]."""
    width = 2 if case.precision == "pure" else 4
    return {
        "master_weights_dtype_bytes": width,
        "other_op_bytes": MOMENTS[case.optimizer] * width,
        "mlp_gated_linear_units": case.config.get("hidden_act") == "silu",
    }
