"""Pfeiffer adapters: half the adapters of Houlsby, and what the published ones count."""

from __future__ import annotations

from estimator.service import estimate


def _trainable(method: str) -> int:
    result = estimate({"model": "openai-community/gpt2", "seq_len": 512, "method": method})
    return result.parameters.trainable


def test_one_adapter_of_48_in_each_of_12_layers_of_768_has_894_528_parameters():
    # The Adapter class of adapters 1.3.0 has 74 544 parameters at width 768 and bottleneck 48;
    # a model of 12 such layers with one each is reported with 894 528.
    assert _trainable("pfeiffer_adapter") == 894_528


def test_houlsby_has_twice_as_many():
    assert _trainable("houlsby_adapter") == 2 * 894_528
