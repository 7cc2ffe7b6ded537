"""Weights, gradients and optimizer states of whole answers, against published and counted bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from estimator.result import Result, ResultRow
from estimator.service import estimate

GB = 10**9
LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"

SEVEN_BILLION: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4000,
    "intermediate_size": 12_501,
    "num_attention_heads": 40,
    "num_hidden_layers": 31,
    "vocab_size": 45_672,
}
"""A model of exactly 7 000 000 000 parameters."""

SEVENTY_BILLION: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8000,
    "intermediate_size": 25_601,
    "num_attention_heads": 80,
    "num_hidden_layers": 79,
    "vocab_size": 77_202,
}
"""A model of exactly 70 000 000 000 parameters."""

TOY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}


def _answer(config: dict[str, Any], **recipe: Any) -> Result:
    """Answer for a single token: the peak is when every gradient exists."""
    result = estimate({"model": {"config": config}, "seq_len": 1, **recipe})
    assert result.peak.moment in ("backward: embeddings", "gradient clipping", "optimizer step")
    return result


def _rows(result: Result, component: str) -> tuple[ResultRow, ...]:
    return next((each.rows for each in result.breakdown if each.component == component), ())


def _states(result: Result, *names: str) -> int:
    """Return the bytes of the named states; step counters and temporaries are other rows."""
    return sum(
        row.bytes
        for row in _rows(result, "optimizer_states")
        if row.name.rsplit(".", 1)[-1] in names
    )


def _states_of(result: Result, weight: str) -> dict[str, int]:
    """Return the states of one weight by name, over all layers [bytes]."""
    return {
        row.name.rsplit(".", 1)[-1]: row.bytes
        for row in _rows(result, "optimizer_states")
        if row.name.startswith(f"{weight}.")
    }


def _weights_and_gradients(result: Result) -> int:
    return sum(row.bytes for part in ("weights", "gradients") for row in _rows(result, part))


def _trained(result: Result) -> int:
    return _weights_and_gradients(result) + _states(result, "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(
    ("config", "parameters", "gigabytes"),
    [(SEVEN_BILLION, 7 * GB, 112), (SEVENTY_BILLION, 70 * GB, 1120)],
    ids=["7 B", "70 B"],
)
def test_adamw_in_mixed_precision_with_fp32_weights_takes_16_bytes_a_parameter(
    config: dict[str, Any], parameters: int, gigabytes: int
) -> None:
    result = _answer(config, precision="amp_bf16")
    assert result.parameters.total == parameters
    assert _trained(result) == gigabytes * GB


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_adam_in_one_precision_takes_four_times_the_weights(precision: str, width: int) -> None:
    for name in ("adam", "adamw"):
        result = _answer(SEVEN_BILLION, precision=precision, optimizer={"name": name})
        assert _trained(result) == 4 * 7 * GB * width


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_sgd_in_one_precision_takes_twice_the_weights(precision: str, width: int) -> None:
    result = _answer(SEVEN_BILLION, precision=precision, optimizer={"name": "sgd"})
    assert _weights_and_gradients(result) == 2 * 7 * GB * width
    assert _rows(result, "optimizer_states") == ()


def test_momentum_adds_one_copy_of_the_weights() -> None:
    optimizer = {"name": "sgd", "momentum": 0.9}
    result = _answer(SEVEN_BILLION, precision="fp32", optimizer=optimizer)
    assert _states(result, "momentum_buffer") == 4 * 7 * GB


def test_adamw_in_fp32_takes_16_bytes_a_parameter_and_adafactor_8_and_a_few_rows() -> None:
    adamw = _answer(SEVEN_BILLION, precision="fp32")
    adafactor = _answer(SEVEN_BILLION, precision="fp32", optimizer={"name": "adafactor"})
    assert _trained(adamw) == 16 * 7 * GB
    assert _weights_and_gradients(adafactor) == 8 * 7 * GB
    assert _states(adafactor, "exp_avg_sq") < 7 * GB / 100


def test_master_weights_keep_states_and_a_copy_in_fp32() -> None:
    """Megatron counts 18 bytes: 2 + 4 for the weights, 4 for the gradient in fp32, 8 for Adam.

    The half precision gradients are gone when the step begins; Megatron's main gradients are the
    fp32 ones, so of its 18 bytes all are seen here. With foreach the peak is the update itself;
    otherwise it is before, when the last gradient is there in both types.
    """
    optimizer = {"name": "adamw", "implementation": "foreach"}
    result = _answer(SEVEN_BILLION, precision="master_bf16", optimizer=optimizer)
    masters = sum(
        row.bytes
        for row in _rows(result, "optimizer_states")
        if row.name.endswith("fp32 master copy")
    )
    assert _trained(result) + masters == 18 * 7 * GB


def test_without_temporaries_master_weights_peak_when_the_last_gradient_is_there_twice() -> None:
    """The head's gradient in bf16 beside its copy: 45672 x 4000 x 2 bytes."""
    result = _answer(SEVEN_BILLION, precision="master_bf16")
    (twice,) = (
        row
        for row in _rows(result, "gradients")
        if row.name == "lm_head.weight, gradient not copied yet"
    )
    assert twice.bytes == 365_376_000


# -- 8 and 4 bits ------------------------------------------------------------------------------


def test_8_bit_adam_takes_2_03125_bytes_for_each_parameter_of_a_linear_layer() -> None:
    """One byte for each moment, and an fp32 scale for each block of 256 (dettmers2022)."""
    result = estimate({"model": LLAMA_2_7B, "optimizer": {"name": "adamw_8bit"}})
    kept = _states_of(result, "mlp.gate_proj.weight")
    assert set(kept) == {"state1", "state2", "absmax1", "absmax2"}
    assert sum(kept.values()) / (32 * 4096 * 11_008) == 2.03125


def test_paged_8_bit_states_of_large_layers_are_outside_of_the_breakdown() -> None:
    """The scales are plain tensors of torch, and stay."""
    result = estimate({"model": LLAMA_2_7B, "optimizer": {"name": "paged_adamw_8bit"}})
    assert set(_states_of(result, "mlp.gate_proj.weight")) == {"absmax1", "absmax2"}
    (paged,) = (row for row in result.outside if row.name == "paged optimizer states")
    assert paged.bytes > 2 * 32 * 4096 * 11_008


@pytest.mark.parametrize(
    ("double_quant", "bytes_per_parameter"), [(False, 0.5625), (True, 0.515869140625)]
)
def test_nf4_stores_a_parameter_in_this_many_bytes(
    double_quant: bool, bytes_per_parameter: float
) -> None:
    """Half a byte, an fp32 scale for each 64, or one byte for each and fp32 for each 256 of them.

    The code books and the offset, the same few bytes for each tensor, are rows of their own.
    """
    result = estimate(
        {
            "model": "meta-llama/Llama-3.1-8B",
            "method": {"name": "lora"},
            "quantization": {"name": "nf4", "double_quant": double_quant},
        }
    )
    stored = ("weight", "absmax", "nested_absmax")
    down = sum(
        row.bytes
        for row in _rows(result, "weights")
        if row.name.startswith("mlp.down_proj.weight") and row.name.rsplit(".", 1)[-1] in stored
    )
    assert down / (32 * 4096 * 14_336) == bytes_per_parameter


# -- counted on the real optimizers and the real quantizer ------------------------------------


@cache
def _toy_model() -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(TOY)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32
    )


def _real_states(optimizer: Any, model: Any) -> int:
    """Run one real step and return the bytes of its states, step counters left out."""
    import torch

    ids = torch.zeros((1, 4), dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step"
    )


def test_adafactor_keeps_what_the_optimizer_of_transformers_keeps() -> None:
    from transformers.optimization import Adafactor

    model = _toy_model()
    result = _answer(TOY, precision="fp32", optimizer={"name": "adafactor"})
    kept = _states(result, "exp_avg_sq", "RMS")
    assert kept == _real_states(Adafactor(model.parameters()), model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_keeps_what_the_optimizer_of_torch_keeps(momentum: float) -> None:
    import torch

    model = _toy_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    asked = {"name": "sgd", "momentum": momentum}
    result = _answer(TOY, precision="fp32", optimizer=asked)
    assert _states(result, "momentum_buffer") == _real_states(optimizer, model)


def test_adamw_keeps_what_the_optimizer_of_torch_keeps() -> None:
    import torch

    model = _toy_model()
    optimizer = torch.optim.AdamW(model.parameters())
    result = _answer(TOY, precision="fp32")
    assert _states(result, "exp_avg", "exp_avg_sq") == _real_states(optimizer, model)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_packed_weight_holds_the_bytes_that_bitsandbytes_makes(double_quant: bool) -> None:
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.zeros(96, 64), compress_statistics=double_quant, quant_type="nf4"
    )
    real = {"weight": packed.nbytes, "absmax": state.absmax.nbytes, "code": state.code.nbytes}
    if double_quant:
        real["offset"] = state.offset.nbytes
        real["nested_absmax"] = state.state2.absmax.nbytes
        real["nested_code"] = state.state2.code.nbytes
    result = estimate(
        {
            "model": {"config": TOY},
            "method": {"name": "lora"},
            "quantization": {"name": "nf4", "double_quant": double_quant},
            "seq_len": 1,
        }
    )
    ours = {
        row.name.rsplit(".", 1)[-1]: row.bytes // row.count
        for row in _rows(result, "weights")
        if row.name.startswith("mlp.gate_proj.weight")
    }
    assert ours == real
