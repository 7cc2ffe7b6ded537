"""A tiny model on the GPU of this machine, against the dry run; skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.record import Meters, Probe, Run, read
from estimator.request import parse_request
from profiler import engine

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _measured(tmp_path: Path, *arguments: str) -> Any:
    out = tmp_path / "out.jsonl"
    subprocess.run(
        [sys.executable, "-m", "profiler.measure", *arguments, "--append", str(out)],
        check=True,
        cwd=ROOT,
        timeout=600,
    )
    return read(out)[-1]


def _run(tmp_path: Path, document: dict[str, Any], *arguments: str) -> Run:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(document))
    found: Run = _measured(tmp_path, str(path), *arguments)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "amp_bf16", "activation_checkpointing": "full"},
        {"method": "lora", "optimizer": {"name": "adamw", "implementation": "foreach"}},
    ],
    ids=str,
)
def test_a_measured_run_is_within_three_percent_of_the_dry_run(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    document = {"model": {"config": SMALL}, "seq_len": 1024, "micro_batch_size": 2, **fields}
    run = _run(tmp_path, document)
    assert (run.origin, run.outcome, run.steps) == ("measured", "ok", 3)
    asked = {**document, "hardware": {"gpu": run.environment.gpu_id}}
    traced = engine.dry_run(parse_request(asked), SMALL)
    assert run.peak.allocated_bytes == pytest.approx(traced.peak.allocated_bytes.expected, rel=0.03)
    assert run.idle_bytes is None or 50 * 2**20 < run.idle_bytes < 2 * 2**30


def test_a_limit_below_the_need_runs_out_of_memory(tmp_path: Path) -> None:
    document = {"model": {"config": SMALL}, "seq_len": 1024}
    whole = _run(tmp_path, document)
    assert whole.peak.reserved_bytes is not None
    run = _run(tmp_path, document, "--memory-limit", str(whole.peak.reserved_bytes // 2))
    assert run.outcome == "out_of_memory"
    assert run.reason is not None
    assert "out of memory" in run.reason
    assert run.peak != Meters()


def test_importing_torch_and_building_the_model_makes_no_context(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from profiler import real_run\n"
        "from profiler.device import Cuda\n"
        "from estimator.request import parse_request\n"
        f"config = {SMALL!r}\n"
        "asked = parse_request({'model': {'config': config}, 'method': 'lora'})\n"
        "with real_run.prepared(asked, config, Cuda()):\n"
        "    assert not torch._C._cuda_hasPrimaryContext(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)


@pytest.mark.parametrize("name", ["context", "cublas_workspace", "attention_backward"])
def test_a_probe_of_the_gpu_finds_something(name: str, tmp_path: Path) -> None:
    found = _measured(tmp_path, "--probe", name)
    assert isinstance(found, Probe)
    assert (found.outcome, found.reason) == ("ok", None)
    assert found.values
    assert all(size >= 0 for size in found.values.values())
