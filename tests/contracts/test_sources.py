"""Every byte has a source: rows cite keys that exist, and the cited files and functions do too."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from estimator.result import Result, ResultRow
from estimator.service import estimate
from estimator.sources import SOURCES

ROOT = Path(__file__).resolve().parents[2]
LLAMA = "meta-llama/Llama-3.1-8B"

REQUESTS = {
    "full, bf16": {"model": LLAMA},
    "full, fp32, adafactor": {"model": LLAMA, "precision": "fp32", "optimizer": "adafactor"},
    "full, master weights": {"model": LLAMA, "precision": "master_bf16"},
    "full, autocast, accumulation": {
        "model": LLAMA,
        "precision": "amp_bf16",
        "gradient_accumulation_steps": 4,
    },
    "checkpointing, padding": {
        "model": "Qwen/Qwen2.5-7B",
        "padding": True,
        "activation_checkpointing": "full",
    },
    "lora with dropout": {
        "model": "mistralai/Mistral-7B-v0.1",
        "method": {"name": "lora", "lora_dropout": 0.1},
    },
    "qlora, paged": {"model": LLAMA, "method": "qlora", "optimizer": "paged_adamw8bit"},
    "qlora under autocast": {"model": LLAMA, "method": "qlora", "autocast": "bf16"},
    "eager attention": {"model": "gpt2", "seq_len": 512, "attention": "eager"},
    "sgd with momentum": {"model": "gpt2", "seq_len": 512, "optimizer": "sgd_momentum"},
    "long and sliding": {"model": "google/gemma-2-2b", "seq_len": 8192},
    "kept outputs and cache": {
        "model": "EleutherAI/pythia-160m",
        "loop": {"keep_outputs": True, "use_cache": True},
    },
    "old software": {"model": "facebook/opt-125m", "software": {"version": "4.45"}},
}


def _module(name: str) -> ModuleType:
    """Load a module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


CITATIONS = _module("citations").citations()
IN_CODE = [each for each in CITATIONS if not each.in_docstring]
IN_DOCSTRINGS = [each for each in CITATIONS if each.in_docstring]


def _rows(result: Result) -> list[ResultRow]:
    return [row for component in result.breakdown for row in component.rows] + list(result.outside)


@cache
def _result(name: str) -> Result:
    return estimate(REQUESTS[name])


@pytest.mark.parametrize("name", REQUESTS)
def test_every_row_cites_a_known_source_or_shows_its_assumption(name):
    result = _result(name)
    for row in _rows(result):
        key, _, rest = row.source.partition(": ")
        if row.basis == "assumed":
            assert key == "assumed"
            assert rest in result.assumptions, row.name
        else:
            assert key in SOURCES, f"{row.name} cites {row.source!r}"
            assert rest, f"{row.name} names no place in {key}"


def test_every_source_is_cited_somewhere():
    assert {each.key for each in CITATIONS} >= SOURCES.keys()


@pytest.mark.parametrize("cited", CITATIONS, ids=lambda each: f"{each.file}::{each.function}")
def test_every_citation_has_a_known_key_and_a_place(cited):
    assert cited.key in SOURCES
    assert cited.where


def test_a_function_cites_what_its_docstring_names():
    named: dict[tuple[str, str], set[str]] = {}
    for each in IN_DOCSTRINGS:
        named.setdefault((each.file, each.function), set()).add(each.key)
    silent = [
        each
        for each in IN_CODE
        if each.key not in named.get((each.file, each.function), {each.key})
    ]
    assert silent == []


# -- the cited files and functions --------------------------------------------------------------

_PACKAGE_PATH = re.compile(
    r"/blob/v?(?P<version>[\d.]+)/(?:src/)?"
    r"(?P<package>torchao|torch|transformers|peft|accelerate|bitsandbytes)(?P<path>/.*)?$"
)
# A file, or a name that is spelled as code: with an underscore, a dot or a capital inside.
_FILE = re.compile(r"[\w/]+\.py\b")
_NAME = re.compile(r"\b(?=\w*[_A-Z]|\w+\.\w)[A-Za-z_]\w*(?:\.\w+)?")


def _installed(key: str) -> Path | None:
    """Return the installed file or folder behind a source; None for what no package holds."""
    found = _PACKAGE_PATH.search(SOURCES[key].url)
    if not found:
        return None
    spec = importlib.util.find_spec(found["package"])
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent / (found["path"] or "").strip("/")
    return place if place.exists() and "csrc" not in place.parts else None


INSTALLED = [each for each in CITATIONS if each.key in SOURCES and _installed(each.key)]


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _defined(name: str, text: str) -> bool:
    parts = name.split(".")
    return all(re.search(rf"\b{part}\b", text) for part in parts)


@pytest.mark.parametrize(
    "cited", INSTALLED, ids=lambda each: f"{each.file}::{each.function}::{each.where[:40]}"
)
def test_the_cited_place_is_in_the_installed_library(cited):
    place = _installed(cited.key)
    assert place is not None
    words = cited.where
    files = [place / each for each in _FILE.findall(words)] or [place] * place.is_file()
    for path in files:
        assert path.is_file(), f"{cited.key} has no {path.name}"
    everything = "\n".join(_text(path) for path in files)
    for name in _NAME.findall(_FILE.sub("", words)) if files else ():
        assert _defined(name, everything), f"{name} is not in {[path.name for path in files]}"


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("key", [key for key in SOURCES if _PACKAGE_PATH.search(SOURCES[key].url)])
def test_the_cited_version_is_the_one_that_the_tests_run_against(key):
    found = _PACKAGE_PATH.search(SOURCES[key].url)
    assert found is not None
    assert found["version"] == _constraints()[found["package"]]


def _derivatives() -> set[str]:
    """Return the operators that PyTorch has a backward formula for, as it ships them."""
    spec = importlib.util.find_spec("torchgen")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "packaged" / "autograd" / "derivatives.yaml"
    return set(re.findall(r"^- name: ([\w.]+)\(", _text(path), re.MULTILINE))


@pytest.mark.parametrize("name", REQUESTS)
def test_every_cited_derivative_is_in_the_file_that_pytorch_ships(name):
    known = _derivatives()
    for row in _rows(_result(name)):
        key, _, operator = row.source.partition(": ")
        if key == "torch-derivatives":
            assert operator in known, f"{row.name} cites {operator!r}"


def test_every_derivative_in_the_code_is_in_the_file_that_pytorch_ships():
    known = _derivatives()
    cited = {each.where for each in CITATIONS if each.key == "torch-derivatives"}
    assert cited
    assert cited <= known
