"""A campaign of real fresh processes on a simulated device, from the command to the records."""

from __future__ import annotations

import pytest

from estimator.record import Probe, Run, read
from profiler import campaign
from profiler.matrices import Case

MODEL = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
REQUEST = {"model": {"config": MODEL}, "seq_len": 256, "optimizer": "adamw_torch"}
CASES = (
    Case(
        "a probe", "", probe="embedding_backward",
        arguments={"tokens": 3073, "vocab_size": 1000, "hidden_size": 256},
    ),
    Case("enough memory", "", request=REQUEST),
    Case("too little memory", "", request=REQUEST, limit_bytes=8 * 2**20),
    Case("a model that nobody knows", "", request={"model": "nobody/knows-it"}),
)  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("campaign") / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "cases", lambda *_: CASES)
        arguments = ["validation", "--device", "simulated", "--gpu", "h100-80gb-sxm5"]
        assert campaign.main([*arguments, "--out", str(out), "--jobs", "2"]) == 0
    return {_asked(each): each for each in read(out)}


def _asked(record: Run | Probe) -> str:
    if isinstance(record, Probe):
        return "probe"
    if record.request["model"] == "nobody/knows-it":
        return "unknown"
    return "run" if record.limit_bytes is None else "limit"


def test_every_case_has_one_record(records):
    assert {name: each.outcome for name, each in records.items()} == {
        "probe": "ok", "run": "ok", "limit": "out_of_memory", "unknown": "error",
    }  # fmt: skip


def test_nothing_of_a_simulated_device_is_measured(records):
    assert {each.origin for each in records.values()} == {"simulated"}
    assert {each.environment.gpu_id for each in records.values()} == {"h100-80gb-sxm"}


def test_a_run_that_went_through_has_its_readings(records):
    run = records["run"]
    assert run.steps >= 2
    assert run.request["hardware"]["gpu"] == "h100-80gb-sxm"
    assert run.peak.reserved_bytes >= run.peak.allocated_bytes > 0
    assert {"forward", "backward", "optimizer step"} <= {each.phase for each in run.phases}


def test_a_run_with_too_little_memory_says_what_it_was_given(records):
    assert records["limit"].limit_bytes == 8 * 2**20
    assert records["limit"].group == "validation"


def test_a_request_that_the_stack_refuses_is_recorded_with_the_reason(records):
    assert records["unknown"].reason.startswith("refused: ")
    assert "nobody/knows-it" in records["unknown"].reason


def test_the_embedding_that_sorts_takes_more_than_its_gradient(records):
    values = records["probe"].values
    # An fp32 row for each of 3073 tokens, above the 3072 from where on it sorts.
    assert values["backward"] - values["gradient"] >= 4 * 3073 * 256
