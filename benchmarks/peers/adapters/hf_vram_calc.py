"""`hf-vram-calc`: its command, with a folder for the model and JSON for the answer.

Training is its figure for full fine-tuning, LoRA for adapters; neither reads batch or length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from unittest import mock

from hf_vram_calc import cli

from benchmarks.peers.case import Case

GIB: Final = 2**30
FORMATS: Final = {
    "fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "nf4": "int4", "nf4-dq": "int4",
    "gptq-int4": "int4", "gptq-int8": "int8",
}  # fmt: skip


def answer(case: Case) -> float:
    """Return the figure of its JSON [bytes]."""
    case.only_one_gpu()
    case.only_in_transformers()
    case.only_methods("full", "lora", "qlora", "gptq-lora")
    case.only_optimizers("adamw")
    with TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "config.json").write_text(json.dumps(dict(case.config)), encoding="utf-8")
        arguments = [
            "hf-vram-calc", "--model", case.model, "--model_path", str(place),
            "--dtype", FORMATS[case.base],
            "--max_batch_size", str(case.micro_batch_size),
            "--max_seq_len", str(case.seq_len),
            "--lora_rank", str(case.rank or 64),
            "--output_json", str(place / "out.json"),
        ]  # fmt: skip
        with mock.patch.object(sys, "argv", arguments):
            cli.main()
        (found,) = json.loads((place / "out.json").read_text())["memory_requirements"]
    return float(found["training_gib" if case.method == "full" else "lora_size_gib"]) * GIB
