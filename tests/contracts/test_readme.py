"""What the README tells people to type works as it is written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from estimator.request import parse_request

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in _blocks("sh") for line in block.splitlines() if line.strip()]
PYTHON = _blocks("python")
# 1 is the verdict `does_not_fit`: an answer.
ANSWERS = (0, 1)


def _environment() -> dict[str, str]:
    """Put this interpreter and its `estimate` first on the path, and keep the Hub out of it."""
    scripts = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
    }


def _words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_answers(command):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    assert done.returncode in ANSWERS, done.stderr
    assert done.stderr == ""
    assert done.stdout


def test_the_commands_are_safe_to_run():
    for command in COMMANDS:
        programs = {_words(part)[0] for part in command.split("|")}
        assert programs <= {"estimate", "echo", "python"}, command
        assert "serve" not in _words(command)


@pytest.mark.parametrize("example", PYTHON)
def test_the_python_of_the_readme_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith(("fits ", "tight ", "does_not_fit "))


def test_the_readme_has_something_to_run():
    assert len(COMMANDS) >= 8
    assert PYTHON


def test_the_first_commands_are_those_that_need_nothing_else():
    first = [line.split()[:2] for line in README.splitlines() if line.startswith("    make ")]
    assert first == [["make", "run"], ["make", "test"]]
    before = README.partition("    make run")[0]
    assert before.count("\n") < 6


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", README))))
def test_every_make_target_of_the_readme_exists(target):
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("document", re.findall(r"echo '(\{.*\})'", README))
def test_an_inline_request_of_the_readme_is_valid(document):
    assert parse_request(document).model
