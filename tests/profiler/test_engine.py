"""The dry run as a user meets it: its document, its refusals, its commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from estimator.commands import estimate
from estimator.errors import (
    EstimatorError,
    InvalidConfigError,
    InvalidRequestError,
    MissingDependencyError,
    UnsupportedCombinationError,
    UnsupportedModelError,
)
from estimator.render.document import to_json
from profiler import engine
from tests.profiler.recipes import TINY, request


def test_the_rows_of_the_document_sum_to_the_peak() -> None:
    result = engine.dry_run(request(TINY), TINY)
    assert result.engine == "dry-run"
    peak = result.peak.allocated_bytes.expected
    assert sum(part.bytes for part in result.breakdown) == peak
    for part in result.breakdown:
        assert sum(row.bytes for row in part.rows) == part.bytes
    assert max(moment.bytes for moment in result.timeline) == peak
    assert [moment.moment for moment in result.timeline] == [
        "forward",
        "loss forward",
        "loss backward",
        "backward",
        "gradient clipping",
        "optimizer step",
    ]


def test_two_runs_give_the_same_document() -> None:
    asked = request(TINY, precision="amp_bf16", activation_checkpointing="full")
    assert to_json(engine.dry_run(asked, TINY)) == to_json(engine.dry_run(asked, TINY))


def test_an_architecture_without_sdpa_says_what_is_run_instead() -> None:
    config = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4}
    run = engine.run(request(config), config)
    assert run.notes == ("attention: BloomForCausalLM has no 'sdpa'; transformers runs 'eager'",)


@pytest.mark.parametrize(
    ("config", "fields", "error", "words"),
    [
        (
            TINY,
            {"method": {"name": "lora", "target_modules": ["nothing"]}},
            InvalidRequestError,
            "Target modules {'nothing'} not found",
        ),
        (
            TINY,
            {"activation_checkpointing": "sometimes"},
            UnsupportedCombinationError,
            "known: none, full",
        ),
        (TINY, {"quantization": "nf4"}, InvalidRequestError, "method=lora"),
        (TINY, {"optimizer": "lioness"}, InvalidRequestError, "known: adafactor, adagrad"),
        (
            TINY,
            {"precision": "fp32", "attention": "flash_attention_2"},
            InvalidRequestError,
            "fp16 and bf16",
        ),
        ({"model_type": "baichuan"}, {}, UnsupportedModelError, "remote code is never run"),
        ({"hidden_size": 64}, {}, InvalidConfigError, "no 'model_type'"),
        ({**TINY, "num_attention_heads": 0}, {}, EstimatorError, ""),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    config: dict[str, Any], fields: dict[str, Any], error: type[EstimatorError], words: str
) -> None:
    with pytest.raises(error) as refusal:
        engine.run(request(config, **fields), config)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_torch_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "profiler.fake_run", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"vramplan\[profiler\]"):
        engine.dry_run(request(TINY), TINY)


@pytest.fixture
def request_file(tmp_path: Path) -> str:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"model": {"config": TINY}, "seq_len": 64}))
    return str(path)


def test_the_command_prints_the_document_and_writes_trace_and_picture(
    request_file: str, tmp_path: Path
) -> None:
    trace, picture = tmp_path / "step.json", tmp_path / "step.svg"
    arguments = ["--request", request_file, "--json", "--trace", str(trace), "--svg", str(picture)]
    outcome = CliRunner().invoke(estimate, ["dry-run", *arguments])
    assert outcome.exception is None, outcome.output
    document = json.loads(outcome.stdout)
    assert (document["schema"], document["engine"]) == ("estimate/v1", "dry-run")
    assert json.loads(trace.read_text())["traceEvents"]
    assert picture.read_text().startswith("<svg")


def test_the_command_draws_the_step_for_people(request_file: str) -> None:
    outcome = CliRunner().invoke(estimate, ["dry-run", "--request", request_file])
    assert outcome.exception is None, outcome.output
    assert "forward ... optimizer step" in outcome.stdout


def test_the_comparison_subtracts_the_engines_row_by_row(request_file: str) -> None:
    outcome = CliRunner().invoke(estimate, ["compare-engines", "--request", request_file])
    assert outcome.exception is None, outcome.output
    heading, peak = outcome.stdout.splitlines()[:2]
    assert heading.split() == ["analytic", "dry-run", "difference"]
    analytic, dry_run, difference = (int(word.replace(",", "")) for word in peak.split()[1:4])
    assert analytic - dry_run == difference
