"""What scripts may rely on: flags, exit codes, streams, and a light start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from estimator import commands
from estimator.flags import FLAGS

MODEL = ("--model", "meta-llama/Llama-3.1-8B")

# A flag that leaves this list breaks somebody's script; a new one is added here.
FROZEN_FLAGS = """
--model --task
--method --lora-r --lora-alpha --lora-dropout --target-modules --modules-to-save --lora-bias
--adapter-dtype --quantization --double-quant --compute-dtype --prepare-kbit
--method-exclude-modules --method-layers-to-transform --method-layers-pattern
--method-rank-pattern --method-alpha-pattern --method-lora-bias --method-use-rslora
--method-init-lora-weights --method-use-dora --method-trainable-token-indices
--method-target-parameters --method-loraplus-lr-ratio --method-last-layers --method-modules
--method-norms --method-biases --method-embeddings --method-freeze-others
--method-adapter-prompt-length
--method-adapter-start-layer --method-num-virtual-tokens --method-prompt-tuning-init
--method-encoder-reparameterization-type --method-encoder-hidden-size --method-prefix-projection
--method-feedforward-modules --method-alpha --method-decompose-both --method-decompose-factor
--method-oft-block-size --method-num-cayley-neumann-terms --method-boft-block-size
--method-n-frequency --method-scaling --method-reduction-factor --method-non-linearity
--method-layers --method-positions --method-share-weights --method-dropout --method-vera-dropout
--method-save-projection --method-init-r --method-target-r --method-total-step --method-tinit
--method-tfinal --method-update-and-allocate --method-num-tokens --method-adapter-len
--method-adapter-layers --method-activated-layers --method-keep-states --method-num-vectors
--method-vector-length --method-topk --method-vblora-dropout --method-save-only-topk-weights
--quantization-skip-modules
--quantization-quant-storage --quantization-threshold
--quantization-bits --quantization-group-size --quantization-desc-act --quantization-kernel
--quantization-axis
--precision --autocast
--fp8 --fp8-recipe --fp8-pad-inner-dim --fp8-filter-fqns --fp8-fp8-format --fp8-amax-history-len
--qat --qat-weight-dtype --qat-activation-dtype --qat-group-size
--optimizer --optimizer-implementation --momentum --optimizer-in-backward
--optimizer-amsgrad --optimizer-nesterov --optimizer-centered --optimizer-beta1
--optimizer-rank --optimizer-scale-type --optimizer-max-precondition-dim
--optimizer-bf16-stochastic-round --optimizer-offload-gradients --optimizer-minimal-size
--micro-batch-size --seq-len --sample-lengths --gradient-accumulation-steps
--padding --own-loss --packing
--activation-checkpointing --attention --loss --kernels
--keep-outputs --use-cache --set-to-none --neftune-noise-alpha
--label-smoothing-factor --max-grad-norm --ema --logits-to-keep --framework --framework-version
--strategy --dp-replicate --dp-shard --tp --sequence-parallel --cp --pp --ep --zero-stage
--reshard-after-forward --offload-params --offload-optimizer
--gpu --num-gpus --memory --reserved-by-others --host-memory --confidence --waterfall
"""
OWN_FLAGS = """
--request --json --explain --quiet --engine --fail-on --offline --no-color --version
"""

# Measures what the command imports; the module that lists plug-ins must not even be asked.
PROBE = """
import importlib.metadata, sys

def refuse(**_):
    raise AssertionError("installed packages were scanned")

importlib.metadata.entry_points = refuse
from estimator.commands import run
code = run(sys.argv[1:])
print(sorted(sys.modules), file=sys.stderr)
sys.exit(code)
"""
HEAVY = {
    "torch", "transformers", "numpy", "fastapi", "huggingface_hub", "rich", "yaml", "httpx",
    "plotly", "pynvml", "profiler", "web",
}  # fmt: skip


def _estimate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "estimator", "--offline", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def _imported(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    return set(done.stderr.strip().strip("[]").replace("'", "").split(", "))


def test_the_flags_are_those_that_were_promised():
    # In any order: techniques bring flags of their own.
    assert sorted(flag.option for flag in FLAGS) == sorted(FROZEN_FLAGS.split())
    own = {name for option in commands.estimate.params for name in option.opts}
    assert own == {*FROZEN_FLAGS.split(), *OWN_FLAGS.split()}


def test_the_json_path_imports_nothing_heavy_and_scans_no_packages():
    assert _imported(*MODEL, "--json") & HEAVY == set()


def test_a_yaml_request_imports_yaml_and_still_nothing_else(tmp_path):
    (tmp_path / "r.yaml").write_text("model: meta-llama/Llama-3.1-8B\n")
    imported = _imported("--request", str(tmp_path / "r.yaml"), "--json")
    assert imported & HEAVY == {"yaml"}


def test_the_text_path_imports_rich_and_nothing_else():
    assert _imported(*MODEL) & HEAVY == {"rich"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([*MODEL, "--method", "qlora", "--gpu", "h100-80gb-sxm"], 0),
        ([*MODEL], 0),
        ([*MODEL, "--gpu", "rtx-4090"], 1),
        ([*MODEL, "--gpu", "rtx-9999"], 2),
        ([*MODEL, "--nonsense"], 2),
        ([], 2),
        (["--model", "no-such/model"], 3),
    ],
)
def test_the_exit_code_of_a_real_process(arguments, code):
    done = _estimate(*arguments, "--json")
    assert done.returncode == code, done.stderr
    assert (done.stderr == "") == (code < 2)
    assert (done.stdout == "") == (code >= 2)


def test_a_run_that_only_just_fits_can_fail_a_pipeline():
    whole = json.loads(_estimate(*MODEL, "--json").stdout)
    high = whole["peak"]["needed_bytes"]["high"]
    low = whole["peak"]["needed_bytes"]["low"]
    between = str((low + high) // 2)
    assert _estimate(*MODEL, "--memory", between, "--quiet").returncode in (0, 1)
    done = _estimate(*MODEL, "--memory", between, "--fail-on", "tight", "--json")
    assert done.returncode == {"tight": 4, "does_not_fit": 1}[json.loads(done.stdout)["verdict"]]


def test_the_text_shows_the_parameters_and_rows_that_sum_to_the_peak():
    done = _estimate(*MODEL, COLUMNS="100")
    assert done.stdout.splitlines()[0]
    assert "parameters  8 030 261 248" in done.stdout
    document = json.loads(_estimate(*MODEL, "--json").stdout)
    assert document["parameters"]["total"] == 8_030_261_248
    whole = sum(component["bytes"] for component in document["breakdown"])
    assert f"{whole:,}".replace(",", " ") in done.stdout
    for component in document["breakdown"]:
        assert sum(row["bytes"] for row in component["rows"]) == component["bytes"]


def test_flags_and_a_request_document_give_the_same_bytes(tmp_path):
    path = tmp_path / "request.json"
    document = {
        "model": MODEL[1],
        "method": {"name": "lora", "r": 8},
        "seq_len": 1024,
        "hardware": {"gpu": "rtx-4090"},
    }
    path.write_text(json.dumps(document))
    flags = ("--method", "lora", "--lora-r", "8", "--seq-len", "1024", "--gpu", "rtx-4090")
    by_file = _estimate("--request", str(path), "--json")
    assert by_file.stdout == _estimate(*MODEL, *flags, "--json").stdout
    assert by_file.stdout


def test_the_printed_request_reproduces_the_answer(tmp_path):
    first = _estimate(*MODEL, "--method", "qlora", "--gpu", "rtx-4090", "--json").stdout
    path = tmp_path / "again.json"
    path.write_text(json.dumps(json.loads(first)["request"]))
    again = json.loads(_estimate("--request", str(path), "--json").stdout)
    for part in ("peak", "breakdown", "timeline", "verdict", "limits", "parameters"):
        assert again[part] == json.loads(first)[part]


def test_explain_names_formula_and_source_of_every_row():
    document = json.loads(_estimate(*MODEL, "--json").stdout)
    text = _estimate(*MODEL, "--explain", COLUMNS="400").stdout
    for component in document["breakdown"]:
        for row in component["rows"]:
            assert row["formula"]
            assert row["formula"] in text
            assert row["source"] in text


def test_a_pipe_gets_plain_text_and_a_narrow_encoding_gets_ascii():
    assert "\x1b" not in _estimate(*MODEL).stdout
    assert _estimate(*MODEL, PYTHONIOENCODING="ascii").stdout.isascii()


def test_sixty_columns_are_enough():
    text = _estimate(*MODEL, "--gpu", "rtx-4090", COLUMNS="60").stdout
    assert max(map(len, text.splitlines())) <= 60


def test_a_reader_that_stops_early_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "estimator", "models"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "estimator", "gpus"],
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            check=False,
            timeout=60,
        )
    assert done.returncode == commands.EXIT_USAGE
    assert done.stderr == "error: No space left on device\n"


def test_a_fault_of_ours_does_not_exit_like_a_verdict():
    """Exit code 1 would tell a script that the run does not fit."""
    script = "from estimator import cli, service; service.estimate = None; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--offline", *MODEL],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    assert done.returncode == commands.EXIT_CANNOT_ESTIMATE
    assert "TypeError" in done.stderr


def test_help_names_every_flag_the_exit_codes_and_completion():
    text = _estimate("--help").stdout
    for flag in (*FROZEN_FLAGS.split(), *OWN_FLAGS.split()):
        assert flag in text
    assert "Exit codes: 0 fits" in text
    assert "_ESTIMATE_COMPLETE=bash_source" in text
