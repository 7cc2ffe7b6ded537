"""The command `estimate reconcile`: one line for what is wrong, and the right exit code."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from estimator.commands import run

MODEL = ("--offline", "--model", "gpt2", "--seq-len", "512")
# JDAI-CV/centerX#51
MESSAGE = (
    "RuntimeError: CUDA out of memory. Tried to allocate 130.00 MiB (GPU 1; 7.80 GiB total "
    "capacity; 5.91 GiB already allocated; 33.56 MiB free; 6.09 GiB reserved in total by PyTorch)"
)


def reconcile(capsys, *arguments):
    code = run(["reconcile", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_measurement_is_told_in_words(capsys):
    code, out, err = reconcile(capsys, *MODEL, "--measured", "4GiB")
    assert (code, err) == (0, "")
    assert out.startswith("Measured 4.00 GiB (allocated)")
    assert "What would explain it" in out
    assert "Not tried" in out


def test_the_document_is_printed_with_json(capsys):
    code, out, _ = reconcile(capsys, *MODEL, "--measured", "4GiB", "--meter", "reserved", "--json")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, "reconcile/v1")
    assert document["reading"]["meter"] == "reserved"


def test_flags_win_over_the_request_file(capsys, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": "gpt2", "seq_len": 512}))
    arguments = ("--offline", "--request", str(file), "--seq-len", "256", "--measured", "2GiB")
    _, out, _ = reconcile(capsys, *arguments, "--json")
    assert json.loads(out)["request"]["seq_len"] == 256


def test_a_message_comes_from_a_file_or_from_standard_input(capsys, tmp_path, monkeypatch):
    file = tmp_path / "error.txt"
    file.write_text(MESSAGE)
    from_file = reconcile(capsys, "--oom", str(file))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(MESSAGE.encode())))
    assert reconcile(capsys, "--oom", "-") == from_file
    assert from_file[0] == 0
    assert from_file[1].startswith("Fragmentation: the allocator held 184.32 MiB")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "give --measured"),
        (("--measured", "4GiB"), 2, "name a model"),
        ((*MODEL, "--measured", "4"), 2, "--measured: 4 is 4 bytes; write a unit"),
        ((*MODEL, "--measured", "four"), 2, "--measured: cannot read"),
        ((*MODEL, "--measured", "4GiB", "--meter", "volt"), 2, "--meter"),
        ((*MODEL, "--oom", "no/such/file"), 2, "cannot read no/such/file"),
        (("--request", "-", "--oom", "-"), 2, "cannot both be standard input"),
        (("--offline", "--model", "no/such", "--measured", "4GiB"), 3, "no/such"),
        ((*MODEL, "--micro-batch-size", "0", "--measured", "4GiB"), 2, "--micro-batch-size"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(capsys, arguments, code, said):
    found, out, err = reconcile(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_file_without_a_message_and_an_endless_one_are_refused(capsys, tmp_path):
    file = tmp_path / "log.txt"
    file.write_text("Killed\n")
    assert "paste the line that begins with" in reconcile(capsys, "--oom", str(file))[2]
    code, _, err = reconcile(capsys, "--oom", "/dev/zero")
    assert (code, err.count("\n")) == (2, 1)
    assert "larger than" in err
