"""A config.json from a stranger gets one clear line, whatever it holds."""

import json
import os

import pytest

from estimator.config_file import (
    MAX_CONFIG_BYTES,
    asks_for_remote_code,
    parse_config,
    read_config,
    remote_code_refusal,
)
from estimator.errors import (
    EstimatorError,
    InvalidConfigError,
    MalformedDocumentError,
    UnknownModelError,
    UnsupportedModelError,
)


def test_a_config_is_read_as_the_dictionary_it_holds(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 64, "rope_theta": 1e6, "rope_scaling": null}')
    assert read_config(path) == {"hidden_size": 64, "rope_theta": 1e6, "rope_scaling": None}


def test_a_utf8_byte_order_mark_is_accepted():
    assert parse_config(b'\xef\xbb\xbf{"a": 1}', "config.json") == {"a": 1}


def test_of_two_equal_keys_the_last_one_counts():
    assert parse_config('{"a": 1, "a": 2}', "config.json") == {"a": 2}


DEEP = '{"a": ' * 40 + "1" + "}" * 40


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (b'{"a": 1,}', MalformedDocumentError, r"line 1, column \d"),
        (b'{\n "a": 1\n "b": 2}', MalformedDocumentError, "line 3, column 2"),
        (b"", MalformedDocumentError, "line 1, column 1"),
        (b"[1, 2]", InvalidConfigError, "JSON array"),
        (b'"llama"', InvalidConfigError, "JSON string"),
        (b"null", InvalidConfigError, "JSON null"),
        (b"true", InvalidConfigError, "JSON boolean"),
        (b"7", InvalidConfigError, "JSON number"),
        (b'{"hidden_size": NaN}', MalformedDocumentError, "NaN"),
        (b'{"hidden_size": -Infinity}', MalformedDocumentError, "-Infinity"),
        (b'{"hidden_size": 1e999}', MalformedDocumentError, "1e999"),
        (b'{"a": ' + b"9" * 10_000 + b"}", MalformedDocumentError, "10000 digits"),
        (DEEP.encode(), MalformedDocumentError, "deeper than 32"),
        (b"[" * 200_000, MalformedDocumentError, "deeper than 32"),
        ('{"a": 1}'.encode("utf-16"), MalformedDocumentError, "UTF-16"),
        ('{"a": 1}'.encode("utf-32-be"), MalformedDocumentError, "binary"),
        (b"\x80\x02}q\x00.", MalformedDocumentError, "binary"),
        (b'{"name": "\xff\xfe"}', MalformedDocumentError, "not UTF-8"),
    ],
    ids=lambda value: None if isinstance(value, type) else repr(value)[:30],
)
def test_what_is_not_a_config_is_refused_in_one_line(text, error, says):
    with pytest.raises(error, match=says) as refusal:
        parse_config(text, "config.json")
    assert "\n" not in str(refusal.value)
    assert "config.json" in str(refusal.value)


def test_the_deepest_real_nesting_is_accepted():
    # Llama-4 and Qwen-VL nest three levels.
    text = '{"text_config": {"rope_scaling": {"factor": [1.0]}}}'
    assert parse_config(text, "config.json")["text_config"]


def test_a_fifty_megabyte_config_is_refused_without_being_read_whole(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(50 * 1024 * 1024)
    with pytest.raises(MalformedDocumentError, match="larger than 1048576 bytes"):
        read_config(path)


def test_a_config_just_below_the_cap_is_accepted():
    text = json.dumps({"pad": "x" * (MAX_CONFIG_BYTES - 20)})
    assert parse_config(text, "config.json")


@pytest.mark.parametrize("name", ["absent.json", "x" * 300])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UnknownModelError, match="cannot read"):
        read_config(tmp_path / name)


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(UnknownModelError, match="not a file"):
        read_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a Unix thing")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    with pytest.raises(UnknownModelError, match="not a file"):
        read_config(pipe)


def test_every_refusal_is_one_of_the_estimator_s():
    with pytest.raises(EstimatorError):
        parse_config("{", "config.json")


@pytest.mark.parametrize(
    ("config", "asks"),
    [
        # microsoft/Phi-3-mini and THUDM/chatglm3-6b publish such maps.
        ({"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}, True),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLM"}}, True),
        ({"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}, False),
        ({"auto_map": {}}, False),
        ({"auto_map": "modeling_x.X"}, True),
        ({"trust_remote_code": True}, True),
        ({"trust_remote_code": False}, False),
        ({"model_type": "llama"}, False),
    ],
)
def test_a_config_asks_for_remote_code_when_its_architecture_is_code(config, asks):
    assert asks_for_remote_code(config) is asks


def test_the_refusal_of_remote_code_says_that_it_is_never_run():
    refusal = remote_code_refusal({"model_type": "chatglm"}, "THUDM/chatglm3-6b")
    assert isinstance(refusal, UnsupportedModelError)
    assert "never run" in str(refusal)
    assert "'chatglm'" in str(refusal)
