"""The form: a query is a request, and a request is a query."""

from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.errors import InvalidRequestError, MalformedDocumentError
from estimator.flags import request_fields
from estimator.request import METHOD_ALIASES, METHODS, parse_request
from web import form


def test_every_field_of_the_request_has_a_control():
    assert set(form.controls()) == set(request_fields())


def test_a_query_means_what_the_flags_of_the_same_names_mean():
    document = form.read([
        ("model", "gpt2"), ("gpu", "rtx-4090"), ("method", "qlora"), ("lora-r", "8"),
        ("memory", "24GiB"), ("padding", "true"), ("kernels", "liger,compile"), ("config", " "),
    ])  # fmt: skip
    request = parse_request(document)
    assert request.method.name == "lora"
    assert request.method.r == 8
    assert request.quantization.name == "nf4"
    assert request.hardware.memory_bytes == 24 * 2**30
    assert request.padding is True
    assert request.kernels == ("liger", "compile")


def test_an_empty_field_is_one_left_out():
    assert form.read([("model", "gpt2"), ("gpu", ""), ("seq-len", "  ")]) == {"model": "gpt2"}


def test_the_fields_of_a_method_that_is_not_chosen_are_left_out():
    """A form without JavaScript sends all of its fields."""
    everything = [(control.name, control.default) for control in form.controls().values()]
    document = form.read([("model", "gpt2"), *everything[1:], ("method", "full")])
    assert parse_request(document) == parse_request({"model": "gpt2"})


@pytest.mark.parametrize(
    ("pairs", "pointer"),
    [
        ([("modle", "gpt2")], "/modle"),
        ([("model", "gpt2"), ("seq-len", "long")], "/seq_len"),
        ([("model", "gpt2"), ("memory", "24 apples")], "/hardware/memory_bytes"),
        ([("model", "gpt2"), ("precision", "int3")], "/precision"),
        ([("config", "{" + " " * 20_000 + "}")], "/model/config"),
    ],
)
def test_a_bad_field_is_refused_by_its_pointer(pairs, pointer):
    with pytest.raises(InvalidRequestError) as caught:
        form.read(pairs)
    assert caught.value.errors[0][0] == pointer


def test_a_misspelt_field_names_the_one_that_was_meant():
    with pytest.raises(InvalidRequestError, match="did you mean 'seq-len'"):
        form.read([("model", "gpt2"), ("seqlen", "1")])


def test_a_config_that_is_no_json_is_refused():
    with pytest.raises(MalformedDocumentError):
        form.read([("config", "{")])


def test_a_pasted_config_is_used_instead_of_the_name():
    document = form.read([("model", "gpt2"), ("config", '{"hidden_size": 64}')])
    assert document["model"] == {"config": {"hidden_size": 64}}


def test_a_short_form_stays_short_in_the_address():
    assert form.write({"model": "gpt2", "method": "qlora"}) == "model=gpt2&method=qlora"


def test_a_change_is_written_over_the_query_and_keeps_the_rest():
    query = [("model", "gpt2"), ("method", "lora"), ("lora-r", "64"), ("gpu", "rtx-4090")]
    for change, expected in (
        ({"micro_batch_size": 2}, {"micro-batch-size": "2", "method": "lora", "lora-r": "64"}),
        ({"method": {"r": 8}}, {"method": "lora", "lora-r": "8"}),
        ({"method": "qlora"}, {"method": "qlora", "lora-r": "64"}),
        ({"method": {"name": "full"}}, {}),
        ({"optimizer": {"name": "adamw_8bit"}}, {"method": "lora", "optimizer": "adamw_8bit"}),
    ):
        changed = dict(parse_qsl(form.changed(query, change)))
        assert changed.items() >= {"model": "gpt2", "gpu": "rtx-4090", **expected}.items()
        assert ("lora-r" in changed) == (changed.get("method") in ("lora", "qlora"))
        parse_request(form.read(changed.items()))


def test_a_change_keeps_a_pasted_config():
    config = '{"model_type": "gpt2"}'
    changed = form.changed([("config", config)], {"micro_batch_size": 2})
    assert dict(parse_qsl(changed)) == {"config": config, "micro-batch-size": "2"}


def test_the_command_line_quotes_what_a_shell_would_read():
    line = form.command([("model", "a b; rm"), ("padding", "true"), ("seq-len", "2048")])
    assert line == "estimate --model 'a b; rm' --padding"


def test_menus_hold_what_the_request_allows():
    controls = form.controls()
    methods = [choice.value for choice in controls["/method/name"].choices]
    assert methods == [*(kind().name for kind in METHODS), *METHOD_ALIASES]
    assert "flash_attention_2" in [choice.value for choice in controls["/attention"].choices]
    assert "adamw_8bit" in [choice.value for choice in controls["/optimizer/name"].choices]
    assert "full" in [choice.value for choice in controls["/activation_checkpointing"].choices]


REQUESTS = st.fixed_dictionaries(
    {"model": st.sampled_from(["gpt2", "meta-llama/Llama-3.1-8B"])},
    optional={
        "method": st.sampled_from(["full", "lora", "qlora", {"name": "lora", "r": 4}]),
        "precision": st.sampled_from(["fp32", "bf16", "amp_bf16"]),
        "autocast": st.sampled_from([None, "bf16"]),
        "optimizer": st.sampled_from(["adamw", "adamw_torch_fused", {"name": "sgd"}]),
        "micro_batch_size": st.integers(1, 64),
        "seq_len": st.integers(1, 100_000),
        "padding": st.booleans(),
        "kernels": st.lists(st.sampled_from(["liger", "compile"]), unique=True),
        "hardware": st.fixed_dictionaries(
            {}, optional={"gpu": st.just("a100-80gb"), "memory_bytes": st.integers(1, 2**40)}
        ),
    },
)


@given(REQUESTS)
@settings(max_examples=100, deadline=None)
def test_a_request_survives_the_way_through_the_address(document):
    query = form.write(document)
    assert parse_request(form.read(parse_qsl(query))) == parse_request(document)
