"""A machine without msgspec reads, writes and answers the same documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estimator.request import parse_request

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import techniques  # noqa: E402 - a script of the documentation, not a package

GOLDEN = json.loads((ROOT / "tests/golden/requests.json").read_bytes())
ANSWERED = (
    "llama_full_bf16", "llama_qlora_prepared", "gemma2_eager", "opt_fp32_adafactor",
    "gpt2_autocast_without_a_gpu", "falcon_lora_several_rows",
)  # fmt: skip
TECHNIQUES = [{"model": "gpt2", **json.loads(row["request"])} for row in techniques.techniques()]

REFUSED: list[Any] = [
    {},
    {"model": ""},
    {"model": "x" * 600},
    {"model": 3},
    {"model": None},
    {"model": {}},
    {"model": {"config": 1}},
    {"model": {"config": {}, "more": 1}},
    {"modell": "gpt2"},
    {"model": "gpt2", "seq_len": 0},
    {"model": "gpt2", "seq_len": 2.0},
    {"model": "gpt2", "seq_len": True},
    {"model": "gpt2", "seq_len": "long"},
    {"model": "gpt2", "seq_len": None},
    {"model": "gpt2", "seq_len": 10**30},
    {"model": "gpt2", "micro_batch_sise": 1},
    {"model": "gpt2", "task": "walk"},
    {"model": "gpt2", "autocast": 3},
    {"model": "gpt2", "autocast": "fp8"},
    {"model": "gpt2", "padding": 1},
    {"model": "gpt2", "kernels": "liger"},
    {"model": "gpt2", "kernels": ["liger", 3]},
    {"model": "gpt2", "confidence": 1},
    {"model": "gpt2", "confidence": 0},
    {"model": "gpt2", "confidence": "high"},
    {"model": "gpt2", "method": "no such"},
    {"model": "gpt2", "method": 3},
    {"model": "gpt2", "method": None},
    {"model": "gpt2", "method": {"r": 8}},
    {"model": "gpt2", "method": {"name": 8}},
    {"model": "gpt2", "method": {"name": "lora", "r": 0}},
    {"model": "gpt2", "method": {"name": "lora", "rank": 8}},
    {"model": "gpt2", "method": {"name": "lora", "target_modules": "some"}},
    {"model": "gpt2", "method": {"name": "lora", "target_modules": [1]}},
    {"model": "gpt2", "method": {"name": "lora", "rank_pattern": {"q": 0}}},
    {"model": "gpt2", "method": {"name": "lora", "rank_pattern": []}},
    {"model": "gpt2", "method": {"name": "lora", "lora_dropout": 1}},
    {"model": "gpt2", "method": {"name": "lora", "init_lora_weights": "zero"}},
    {"model": "gpt2", "method": {"name": "lora", "init_lora_weights": 1}},
    {"model": "gpt2", "method": {"name": "partial", "last_layers": 0}},
    {"model": "gpt2", "quantization": "int3"},
    {"model": "gpt2", "quantization": []},
    {"model": "gpt2", "parallelism": {"cpu_offload": {"params": "yes"}}},
    {"model": "gpt2", "parallelism": {"zero_stage": 4}},
    {"model": "gpt2", "hardware": {"memory_bytes": -1}},
    {"model": "gpt2", "loop": {"label_smoothing_factor": 1.0}},
    {"model": "gpt2", "loop": [1]},
]
RUN = (
    '{"record":"run","schema":"measurement/v1","id":"a","origin":"simulated","group":"g",'
    '"request":{"model":"gpt2"},"outcome":"ok"'
)
RECORDS = [
    f"{RUN}}}",
    f'{RUN},"steps":3,"peak":{{"allocated_bytes":0,"reserved_bytes":null}},"step_seconds":[1,0.25],'
    '"phases":[{"phase":"forward","peak":{}}],"environment":{"versions":{"torch":"2.13.0"},'
    '"gpu":"na\\u00efve"},"later":1}',
    '{"record":"probe","id":"b","origin":"simulated","group":"g","name":"context","arguments":'
    '{"n":[1e300,1e-7]},"outcome":"error","reason":"no","values":{"context_bytes":5}}',
    f'{RUN},"steps":"three"}}',
    f'{RUN},"outcome":"fine"}}',
    f'{RUN},"peak":[]}}',
    f'{RUN},"environment":{{"versions":{{"torch":2}}}}}}',
    '{"record":"walk"}',
    '{"record":"run"}',
    '{"id":"a"}',
    "[1]",
    "null",
]  # fmt: skip
NUMBERS = [
    "0.95", "-0.0", "1e15", "1e16", "123456789012345680.0", "1e22", "1.5e300", "5e-324", "1e-4",
    "1e-5", "-1.25e-5", "1e-6", "1.5e-7", "nan", "-inf",
]  # fmt: skip
TEXT = {"a": [], "b": {}, 'ü\u2028"\\/\x01\x7f': [1, [True, None, 2.5]], "c": {"d": [{}, {"e": 1}]}}
CALLS: list[Any] = [
    [[1, 2], {}],
    [[1], {"allocated_bytes": 1}],
    [[1, 2, 3, 4, 5], {}],
    [[], {"bytes": 1}],
    [[], {"reserved_bytes": 7}],
]


def _said(how: str) -> dict[str, Any]:
    asked = {
        "answers": {name: GOLDEN[name] for name in ANSWERED},
        "requests": [*GOLDEN.values(), *TECHNIQUES, *REFUSED],
        "values": [{"model": "gpt2", "method": "lora"}, {"model": "gpt2", "kernels": ["liger"]}],
        "records": RECORDS,
        "numbers": NUMBERS,
        "text": TEXT,
        "calls": CALLS,
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("say_documents.py")), how],
        input=json.dumps(asked),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return _said("--without-msgspec")


@pytest.fixture(scope="module")
def upstream() -> dict[str, Any]:
    return _said("--as-installed")


def test_each_side_is_the_one_that_it_claims_to_be(plain, upstream):
    assert (plain["name"], upstream["name"]) == ("profiler.plain_structs", "msgspec")


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_without_msgspec_is_the_one_on_record_byte_for_byte(plain, name):
    assert plain["answers"][name] == (ROOT / f"tests/golden/expected/{name}.json").read_text(
        "utf-8"
    )


def test_every_golden_request_and_every_technique_is_read_as_msgspec_reads_it(plain, upstream):
    read = len(GOLDEN) + len(TECHNIQUES)
    assert plain["requests"][:read] == upstream["requests"][:read]
    assert all(each.startswith("{") for each in plain["requests"][:read])
    assert json.loads(plain["requests"][0]) == json.loads(
        json.dumps(parse_request(next(iter(GOLDEN.values()))).to_dict())
    )


@pytest.mark.parametrize(
    "number", range(len(REFUSED)), ids=lambda number: str(REFUSED[number])[:60]
)
def test_a_wrong_request_is_refused_in_the_same_line(plain, upstream, number):
    at = len(GOLDEN) + len(TECHNIQUES) + number
    assert plain["requests"][at] == upstream["requests"][at]
    assert "Error: " in plain["requests"][at]


@pytest.mark.parametrize("number", range(len(RECORDS)), ids=lambda number: RECORDS[number][:60])
def test_a_record_is_read_and_written_as_msgspec_does(plain, upstream, number):
    assert plain["records"][number] == upstream["records"][number]


def test_numbers_and_text_are_written_as_msgspec_writes_them(plain, upstream):
    assert plain["numbers"] == upstream["numbers"]
    assert plain["text"] == upstream["text"]


def test_every_class_has_the_fields_and_the_configuration_that_msgspec_gives_it(plain, upstream):
    assert len(plain["classes"]) > 100
    assert plain["classes"] == upstream["classes"]


def test_values_are_equal_hashed_frozen_and_made_as_with_msgspec(plain, upstream):
    assert plain["values"] == [[True, True, False, True]] * 2
    assert plain["identity"] == [True, False, True]
    for what in ("values", "identity", "frozen", "calls"):
        assert plain[what] == upstream[what]


def test_it_refuses_to_be_installed_after_the_classes_were_made():
    code = (
        "import sys; sys.modules['msgspec'] = None; sys.modules['estimator.section'] = sys\n"
        "from profiler.plain_structs import install_if_missing\n"
        "install_if_missing()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, cwd=ROOT
    )
    assert "comes too late, after estimator.section" in done.stderr.splitlines()[-1]


def test_where_msgspec_is_there_it_stays():
    code = (
        "from profiler.plain_structs import install_if_missing\n"
        "assert not install_if_missing()\n"
        "import msgspec, estimator.section\n"
        "assert estimator.section.Section.__mro__[1] is msgspec.Struct and msgspec.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
