"""The files in examples/ run as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from estimator import commands
from estimator.request import parse_request
from estimator.request_file import read_request_document

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REQUESTS = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".json", ".yaml"))


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.name)
def test_an_example_request_fits_the_card_that_it_names(path, capsys):
    assert commands.run(["--offline", "--request", str(path), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("Fits: ")


def test_the_json_example_is_qlora_on_a_card_of_24_gib():
    request = parse_request(read_request_document(str(EXAMPLES / "qlora_on_24_gib.json")))
    assert request.method.name == "lora"
    assert request.quantization is not None
    assert request.hardware.gpu == "rtx-4090"


def test_the_python_example_prints_one_line_for_each_recipe():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare_recipes.py")],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert "does_not_fit" in lines[0]
    assert " fits " in lines[3]


def test_the_python_example_refuses_an_unknown_model_in_one_line():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare_recipes.py"), "no-such-model", "rtx-4090"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no-such-model" in done.stderr
