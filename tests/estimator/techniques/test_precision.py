"""What a precision stores, against the table that Megatron-LM prints."""

from __future__ import annotations

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.memory.standing import standing
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.run import Run
from estimator.service import estimate

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 101, "tie_word_embeddings": False,
}  # fmt: skip


def _run(**changes) -> Run:
    document = {"model": "m", "optimizer": "adamw_torch", **changes}
    return resolve(parse_request(document), LLAMA, "m")


def _standing(run: Run, *components: str) -> int:
    return sum(
        entry.row.size[0] * entry.count
        for entry in standing(run).entries
        if entry.row.component in components
    )


@pytest.mark.parametrize(
    ("precision", "bytes_per_parameter"),
    # Megatron-LM, docs, "Distributed Optimizer": theoretical bytes per parameter without sharding.
    # The gradients of `fp32` come and go, so its row has no fp32 gradients here.
    [("megatron_bf16", 18), ("fp32", 16 - 4)],
)
def test_model_states_are_the_bytes_that_megatron_prints(precision, bytes_per_parameter):
    run = _run(precision=precision)
    found = _standing(run, "weights", "gradients", "optimizer_states")
    # Adam's step counters are on the host, and nothing else is there beside the parameters.
    assert found == bytes_per_parameter * run.spec.total_parameters()


def test_main_gradients_stay_as_they_are_when_gradients_are_accumulated():
    one, four = (
        _standing(_run(precision="megatron_bf16", gradient_accumulation_steps=n), "gradients")
        for n in (1, 4)
    )
    assert one == four > 0


def test_adapters_in_fp32_need_no_master_copy():
    run = _run(precision="megatron_bf16", method="lora")
    states = _standing(run, "optimizer_states")
    assert states == 8 * run.spec.trainable_parameters()


@pytest.mark.parametrize(
    "recipe",
    [
        {"precision": "fp16", "autocast": "fp16"},
        {"precision": "bf16", "autocast": "fp16"},
        {"precision": "amp_fp16", "optimizer": "lomo"},
        {"method": {"name": "lora", "adapter_dtype": "base"}, "autocast": "fp16"},
    ],
)
def test_what_the_grad_scaler_does_not_unscale_is_refused(recipe):
    with pytest.raises(UnsupportedCombinationError, match="loss"):
        estimate({"model": "gpt2", "seq_len": 64, **recipe})


def test_the_real_grad_scaler_refuses_fp16_gradients():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([weight]))


def test_tf32_takes_the_bytes_of_fp32_and_says_so():
    fp32, tf32 = (
        estimate({"model": "gpt2", "seq_len": 64, "precision": precision})
        for precision in ("fp32", "tf32")
    )
    assert tf32.peak == fp32.peak
    assert any("same bytes" in note for note in tf32.notes)
