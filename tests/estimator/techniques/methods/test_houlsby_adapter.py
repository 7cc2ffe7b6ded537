"""Bottleneck adapters: counts that papers print, modules of the library, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from tests.conformance.cases import MODELS

GPT3: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 12_288, "n_layer": 96, "n_head": 96, "n_positions": 2048,
    "vocab_size": 50257,
}  # fmt: skip


def _trainable(config: dict[str, Any], method: dict[str, Any]) -> int:
    request = parse_request({"model": {"config": config}, "method": method})
    return resolve(request, config, "model").spec.trainable_parameters()


# hu2021, table 4, rows "GPT-3 (Adapter^H)": adapters of Houlsby with bottlenecks of 1 and 8.
@pytest.mark.parametrize(("bottleneck", "millions"), [(1, 7.1), (8, 40.1)])
def test_houlsby_adapters_of_gpt3_train_what_the_lora_paper_prints(bottleneck, millions):
    method = {"name": "houlsby_adapter", "reduction_factor": 12_288 / bottleneck}
    assert round(_trainable(GPT3, method) / 1e6, 1) == millions


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2"])
@pytest.mark.parametrize("name", ["houlsby_adapter", "pfeiffer_adapter"])
def test_the_modules_of_the_dry_run_have_as_many_parameters(family, name):
    from profiler.workload import meta_model, model_config

    config, method = MODELS[family], {"name": name, "reduction_factor": 7.0}
    request = parse_request({"model": {"config": config}, "method": method})
    model = meta_model(request, model_config(dict(config)))
    counted = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert _trainable(config, method) == counted


def test_a_bottleneck_has_at_least_one_unit():
    method = {"name": "pfeiffer_adapter", "reduction_factor": 1e6}
    # Two matrices of one row or column, one bias of each side, in five layers of width 1152.
    assert _trainable(MODELS["llama"], method) == 5 * (1152 + 1 + 1152 + 1152)


def test_another_family_is_refused_by_name():
    with pytest.raises(UnsupportedCombinationError, match="no source for qwen2"):
        estimate({"model": {"config": MODELS["qwen2"]}, "method": "houlsby_adapter"})


def test_fp32_adapters_beside_bf16_states_need_autocast_as_torch_says():
    method = {"name": "houlsby_adapter", "adapter_dtype": "float32"}
    with pytest.raises(InvalidRequestError, match="autocast"):
        estimate({"model": {"config": MODELS["llama"]}, "method": method})


@pytest.mark.parametrize(
    ("word", "name"), [("double_seq_bn", "houlsby_adapter"), ("seq_bn", "pfeiffer_adapter")]
)
def test_the_names_of_the_library_are_understood(word, name):
    assert parse_request({"model": "gpt2", "method": word}).method.name == name
