"""Which recipes train a model on a card, and how long a sequence each of them allows.

python examples/compare_recipes.py meta-llama/Llama-3.1-8B rtx-4090
"""

from __future__ import annotations

import sys
from typing import Any

from estimator.errors import EstimatorError
from estimator.service import estimate

RECIPES: dict[str, dict[str, Any]] = {
    "full, bf16": {},
    "full, bf16, checkpointing": {"activation_checkpointing": "full"},
    "LoRA, bf16, checkpointing": {"method": "lora", "activation_checkpointing": "full"},
    "QLoRA, checkpointing": {
        "method": "qlora",
        "autocast": "bf16",
        "activation_checkpointing": "full",
    },
}


def main(model: str, gpu: str) -> None:
    """Print one line for each recipe."""
    for name, recipe in RECIPES.items():
        result = estimate({"model": model, "hardware": gpu, "seq_len": 1024, **recipe})
        need = result.peak.needed_bytes.high / 2**30
        length = result.limits.max_seq_len
        print(f"{name:28} {result.verdict:14} {need:7.2f} GiB   longest sequence {length}")


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["meta-llama/Llama-3.1-8B", "rtx-4090"]
    try:
        main(*arguments)
    except EstimatorError as error:
        sys.exit(str(error))
