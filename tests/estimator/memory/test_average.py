"""A moving average of the weights, against torch's own AveragedModel."""

from __future__ import annotations

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.result import Result
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import TOY, toy_model


def _answer(ema: str | None) -> Result:
    loop = {"ema": ema} if ema else {}
    return estimate({"model": {"config": TOY}, "seq_len": 16, "precision": "fp32", "loop": loop})


def test_the_copy_is_as_large_as_that_of_torch():
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    average = swa_utils.AveragedModel(toy_model("fp32"))
    copied = [*average.module.parameters(), *average.module.buffers(), average.n_averaged]
    held = sum(each.nbytes for each in copied)
    plain, averaged = (_weights_and_buffers(_answer(ema)) for ema in (None, "cuda"))
    assert averaged - plain == held


def test_on_the_host_the_update_brings_all_weights_there_once_more():
    model = pytest.importorskip("transformers") and toy_model("fp32")
    weights = sum(each.nbytes for each in model.parameters())
    buffers = sum(each.nbytes for each in model.buffers())
    averaged = _answer("cpu")
    assert averaged.peak.host_bytes.expected == 2 * weights + buffers
    assert averaged.peak.allocated_bytes == _answer(None).peak.allocated_bytes


def test_packed_weights_are_not_averaged():
    with pytest.raises(UnsupportedCombinationError, match="ema"):
        estimate({"model": "gpt2", "method": "qlora", "seq_len": 16, "loop": {"ema": "cuda"}})


def _weights_and_buffers(result: Result) -> int:
    kinds = ("weights", "buffers")
    return sum(part.bytes for part in result.breakdown if part.component in kinds)
