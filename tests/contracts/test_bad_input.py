"""Whatever is typed or sent: one clear line on standard error, the right exit code, no traceback.

The table is the promise; a new way to be wrong is a new row.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from estimator import commands

USAGE, CANNOT_ESTIMATE = 2, 3
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Bad:
    """One bad input: the command line, with `{file}` for a file of this content, and its answer."""

    name: str
    arguments: tuple[str, ...]
    code: int
    said: str
    content: bytes | None = None
    file: str = "request.json"


def _flags(name: str, *arguments: str, code: int = USAGE, said: str) -> Bad:
    return Bad(name, ("--model", "meta-llama/Llama-3.1-8B", *arguments), code, said)


def _request(name: str, content: str | bytes, said: str, file: str = "request.json") -> Bad:
    data = content.encode() if isinstance(content, str) else content
    return Bad(name, ("--request", "{file}"), USAGE, said, data, file)


def _config(name: str, content: dict[str, Any] | str | bytes, said: str, code: int = USAGE) -> Bad:
    text = json.dumps(content) if isinstance(content, dict) else content
    data = text.encode() if isinstance(text, str) else text
    return Bad(name, ("--model", "{file}"), code, said, data, "config.json")


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in LLAMA.items() if name != key}


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_SHARDED = json.dumps({"weight_map": {f"layer.{n}": "a" * 80 for n in range(12_000)}})

NAMES = (
    Bad("unknown model", ("--model", "no-such/model-7b"), CANNOT_ESTIMATE, "no-such/model-7b"),
    Bad("nearly known", ("--model", "llama-3.1-8c"), CANNOT_ESTIMATE, "Llama-3.1-8B"),
    Bad("model that is a sentence", ("--model", "the big one"), USAGE, "not a model id"),
    Bad("empty model", ("--model", ""), USAGE, "--model"),
    Bad("model of 600 characters", ("--model", "x" * 600), USAGE, "--model"),
    Bad("path upwards", ("--model", "../../no/such.json"), CANNOT_ESTIMATE, "no/such.json"),
    Bad("terminal escape in a name", ("--model", "\x1b[31mred\x07"), USAGE, "not a model id"),
    Bad("newline in a name", ("--model", "gpt2\nerror: no"), USAGE, "not a model id"),
    _flags("unknown GPU", "--gpu", "rtx-9999", said="unknown GPU 'rtx-9999'"),
    _flags("ambiguous GPU", "--gpu", "a100", said="could be"),
    _flags("unknown optimizer", "--optimizer", "adamw9", code=USAGE, said="adamw9"),
    _flags("misspelt optimizer", "--optimizer", "adamwx", said="did you mean 'adamw'?"),
    _flags("task beside the known", "--task", "dpo", code=CANNOT_ESTIMATE, said="beside sft"),
    _flags("eight GPUs", "--num-gpus", "8", code=CANNOT_ESTIMATE, said="num_gpus 1"),
    _flags("unknown task", "--task", "guess", said="'guess' is not one of"),
    _flags("task without a source", "--task", "ppo", code=CANNOT_ESTIMATE, said="'ppo'"),
    _flags(
        "unknown checkpointing",
        "--activation-checkpointing",
        "sometimes",
        code=CANNOT_ESTIMATE,
        said="known: none, full",
    ),
    _flags(
        "adapters on nothing",
        "--method",
        "lora",
        "--target-modules",
        "no_such_proj",
        said="no_such_proj",
    ),
    _flags("4-bit weights trained in full", "--quantization", "nf4", said="choose method 'lora'"),
    _flags("rank without adapters", "--lora-r", "8", said="--lora-r needs --method lora"),
    _flags("unknown engine", "--engine", "crystal-ball", said="known: analytic, auto"),
)

NUMBERS = (
    Bad("length beyond the model", ("--model", "gpt2"), USAGE, "give seq_len 1024 or less"),
    _flags("memory without a unit", "--memory", "24", said="write a unit, such as 24GiB"),
    _flags("confidence in per cent", "--confidence", "95", said="0.95 stands for 95 %"),
    _flags("batch 0", "--micro-batch-size", "0", said="--micro-batch-size"),
    _flags("negative batch", "--micro-batch-size", "-4", said="--micro-batch-size"),
    _flags("absurd batch", "--micro-batch-size", str(10**9), said="--micro-batch-size"),
    _flags("number beyond integers", "--seq-len", "9" * 5000, said="--seq-len"),
    _flags("length that is a word", "--seq-len", "long", said="--seq-len"),
    _flags("length with a fraction", "--seq-len", "1.5", said="--seq-len"),
    _flags("negative length", "--seq-len=-1", said="--seq-len"),
    _flags("NaN", "--confidence", "nan", said="--confidence"),
    _flags("infinity", "--confidence", "inf", said="--confidence"),
    _flags("rank 0", "--method", "lora", "--lora-r", "0", said="--lora-r"),
    _flags("dropout of one", "--method", "lora", "--lora-dropout", "1", said="--lora-dropout"),
    _flags("no GPUs", "--num-gpus", "0", said="--num-gpus"),
    _flags("memory 0", "--memory", "0", said="--memory"),
    _flags("negative memory", "--memory", "-24GiB", said="--memory"),
    _flags("memory in parsecs", "--memory", "24 parsecs", said="--memory"),
    _flags("stage 9", "--strategy", "zero", "--zero-stage", "9", said="--zero-stage"),
)

REQUESTS = (
    _request("unknown field", '{"model": "gpt2", "seqlen": 9}', "did you mean 'seq_len'?"),
    _request("unknown inner field", '{"model": "gpt2", "loop": {"use_cach": true}}', "use_cache"),
    _request("number for a word", '{"model": 7}', "model"),
    _request("word for a number", '{"model": "gpt2", "seq_len": "2048"}', "seq_len"),
    _request("truth value for a number", '{"model": "gpt2", "seq_len": true}', "seq_len"),
    _request("number for a truth value", '{"model": "gpt2", "padding": 1}', "padding"),
    _request("null for a number", '{"model": "gpt2", "seq_len": null}', "seq_len"),
    _request("list for a section", '{"model": "gpt2", "hardware": []}', "hardware"),
    _request(
        "object for a word", '{"model": "gpt2", "gradient_checkpointing": {}}', "checkpointing"
    ),
    _request("unknown method", '{"model": "gpt2", "method": "magic"}', "method"),
    _request("NaN in JSON", '{"model": "gpt2", "confidence": NaN}', "NaN"),
    _request("overflowing number", '{"model": "gpt2", "confidence": 1e999}', "confidence"),
    _request(
        "number of 10 000 digits", '{"model": "gpt2", "seq_len": %s}' % ("9" * 10_000), "JSON"
    ),
    _request("no model", '{"seq_len": 9}', "name a model"),
    _request("corrupt JSON", '{"model": "gpt2",', "is not JSON"),
    _request("two documents", '{"model": "gpt2"} {}', "is not JSON"),
    _request("list", "[1, 2]", "a list"),
    _request("lone word", '"gpt2"', "text"),
    _request("empty file", "", "is empty"),
    _request("blank file", " \n\n ", "is empty"),
    _request("binary file", b"\x7fELF\x02\x01\x00\x00\xff\xfe", "request.json"),
    _request("binary text", b'{"model": "gpt2"}\x00', "binary"),
    _request("Latin-1", '{"model": "mod\u00e8le"}'.encode("latin-1"), "UTF-8"),
    _request("large file", b" " * (50 * 2**20), "larger than"),
    _request("deep JSON", '{"model": ' + "[" * 100_000, "nested"),
    _request("deep but closed JSON", '{"model": %s}' % ("[" * 500 + "]" * 500), "model: expected"),
    _request("corrupt YAML", "model: [gpt2\n", "is not YAML", "r.yaml"),
    _request("tabs in YAML", "model: gpt2\n\tseq_len: 8\n", "is not YAML", "r.yaml"),
    _request("YAML alias bomb", _BOMB, "alias", "r.yaml"),
    _request("YAML merge of itself", "a: &a {<<: *a}\n", "alias", "r.yaml"),
    _request("deep YAML", "model: " + "[" * 5_000, "nested", "r.yaml"),
    _request("YAML that builds objects", "model: !!python/object:os.system x\n", "YAML", "r.yaml"),
    _request("impossible date in YAML", "model: 2024-13-45\n", "YAML", "r.yaml"),
    _request("date in YAML", "model: 2024-12-24\n", "not JSON", "r.yaml"),
    _request("several YAML documents", "model: a\n---\nmodel: b\n", "is not YAML", "r.yaml"),
    _request("YAML NaN", "model: gpt2\nconfidence: .nan\n", "confidence", "r.yaml"),
    _request("YAML text", "just words\n", "text", "r.yaml"),
    _request(
        "YAML unknown field", "model: gpt2\nmicro_batchsize: 2\n", "micro_batch_size", "r.yml"
    ),
)

CONFIGS = (
    _config("config without hidden_size", _without("hidden_size"), "hidden_size"),
    _config("config without model_type", _without("model_type"), "model_type"),
    _config("10^9 layers", {**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers"),
    _config("negative layers", {**LLAMA, "num_hidden_layers": -1}, "num_hidden_layers"),
    _config("hidden size 0", {**LLAMA, "hidden_size": 0}, "hidden_size"),
    _config("word for a size", {**LLAMA, "hidden_size": "large"}, "hidden_size"),
    _config("vocabulary of 10^30", {**LLAMA, "vocab_size": 10**30}, "vocab_size"),
    _config("no heads", {**LLAMA, "num_attention_heads": 0}, "num_attention_heads"),
    _config("NaN in a config", json.dumps({**LLAMA, "rms_norm_eps": float("nan")}), "NaN"),
    _config(
        "config that asks for remote code",
        {"model_type": "novel", "auto_map": {"AutoModelForCausalLM": "modeling_novel.Novel"}},
        "remote code",
        CANNOT_ESTIMATE,
    ),
    _config("unknown family", {**LLAMA, "model_type": "novel"}, "novel", CANNOT_ESTIMATE),
    _config("corrupt config", '{"hidden_size": 64', "JSON"),
    _config("list as config", "[]", "object"),
    _config("empty config", "", "JSON"),
    _config("weights index of 1 MB", _SHARDED, "larger than"),
    _config("50 MB config", b"{" + b" " * (50 * 2**20), "larger than"),
    _config("binary config", b"\x80\x04\x95\x00\x00.", "config.json"),
    _config("deep config", '{"a": ' * 40 + "1" + "}" * 40, "nested"),
)

TABLE = (*NAMES, *NUMBERS, *REQUESTS, *CONFIGS)


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[[Bad], list[str]]:
    """Return a function that writes the file of a bad input and names it."""

    def written(bad: Bad) -> list[str]:
        path = tmp_path / bad.file
        if bad.content is not None:
            path.write_bytes(bad.content)
        # Without --offline a miss would ask the network.
        return ["--offline", *(part.replace("{file}", str(path)) for part in bad.arguments)]

    return written


def _assert_one_clear_line(out: str, err: str) -> None:
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert len(err) < 700


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input_gets_one_clear_line_and_its_exit_code(bad, arguments, capsys):
    code = commands.run(arguments(bad))
    out, err = capsys.readouterr()
    _assert_one_clear_line(out, err)
    assert (code, bad.said in err) == (bad.code, True), err


@pytest.mark.parametrize(
    "path", ["/no/such/file.json", "/no/such/file.yaml", "bad\0name", "/"], ids=repr
)
def test_a_request_file_that_cannot_be_opened_is_one_line(path, capsys):
    assert commands.run(["--request", path]) == USAGE
    _assert_one_clear_line(*capsys.readouterr())


@pytest.mark.parametrize("name", ["missing/config.json", "."])
def test_a_model_path_without_a_config_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.run(["--offline", "--model", f"./{name}"]) == CANNOT_ESTIMATE
    _assert_one_clear_line(*capsys.readouterr())


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs the device")
@pytest.mark.parametrize("flag", ["--request", "--model"])
def test_an_endless_file_is_refused(flag, capsys):
    assert commands.run(["--offline", flag, "/dev/zero"]) in (USAGE, CANNOT_ESTIMATE)
    _assert_one_clear_line(*capsys.readouterr())


def test_closed_standard_input_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert commands.run(["--request", "-"]) == USAGE
    _assert_one_clear_line(*capsys.readouterr())


def test_empty_standard_input_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert commands.run(["--request", "-"]) == USAGE
    _assert_one_clear_line(*capsys.readouterr())


def test_an_inline_config_that_lacks_a_size_is_one_line(tmp_path, capsys):
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"model": {"config": _without("hidden_size")}}))
    assert commands.run(["--request", str(path)]) == USAGE
    _assert_one_clear_line(*capsys.readouterr())


REAL_PROCESSES = (
    "unknown model",
    "unknown GPU",
    "NaN",
    "unknown field",
    "binary file",
    "50 MB config",
)


@pytest.mark.parametrize("name", REAL_PROCESSES)
def test_a_real_process_says_the_same(name, arguments):
    (bad,) = (bad for bad in TABLE if bad.name == name)
    done = subprocess.run(
        [sys.executable, "-m", "estimator", *arguments(bad)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    _assert_one_clear_line(done.stdout, done.stderr)
    assert (done.returncode, bad.said in done.stderr) == (bad.code, True), done.stderr
