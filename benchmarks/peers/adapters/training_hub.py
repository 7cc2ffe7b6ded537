"""`training_hub`: `estimate` of its memory estimator.

The file is loaded by itself, because the package imports every trainer that it drives. It reads
the model's shapes through transformers; the weights beside the configuration are left out.
Its full training is fp32 with AdamW and spread over the GPUs.
"""

from __future__ import annotations

import json
import struct
import warnings
from functools import cache
from importlib import util
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.case import CannotExpressError, Case

FILE = "training_hub/profiling/memory_estimator.py"


def answer(case: Case) -> int:
    """Return the expected value for one GPU [bytes]."""
    case.only_in_transformers()
    case.only_methods("full", "lora", "qlora")
    case.only_optimizers("adamw")
    if case.checkpointing != "full":
        raise CannotExpressError("its activations are one tensor a layer: full checkpointing only")
    if case.kernels not in ("", "liger"):
        raise CannotExpressError(f"no kernels of {case.kernels}")
    if case.method == "full":
        case.only_precisions("fp32", "amp")
    elif case.precision != "pure" or case.base.startswith("gptq"):
        raise CannotExpressError("no LoRA over weights in fp32 or GPTQ")
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepared(Path(folder) / case.model.replace("/", "--"), case)
        _, expected, _ = estimator().estimate(
            training_method={"full": "sft"}.get(case.method, case.method),
            num_gpus=case.gpus,
            model_path=str(model),
            batch_size=case.micro_batch_size * case.gpus,
            max_seq_len=case.seq_len,
            use_liger=case.kernels == "liger",
            verbose=0,
            lora_r=case.rank or 32,
        )
    return int(expected)


def prepared(folder: Path, case: Case) -> Path:
    """Write a configuration and an empty checkpoint; every weight of it is missing."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(case.config)), encoding="utf-8")
    tensor = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}
    header = json.dumps({"none": tensor, "__metadata__": {"format": "pt"}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(2)
    (folder / "model.safetensors").write_bytes(content)
    return folder


@cache
def estimator() -> Any:
    """Return the installed module."""
    path = Path(str(distribution("training_hub").locate_file(FILE)))
    spec = util.spec_from_file_location("memory_estimator", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
