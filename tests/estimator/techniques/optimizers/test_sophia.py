"""SophiaG: its states, its second pass, and what it is not answered with."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import TOY, kept_by, kept_in_the_answer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sophia_keeps_what_its_authors_class_keeps(precision: str) -> None:
    from sophia_opt import SophiaG

    assert kept_in_the_answer({"name": "sophia"}, precision) == kept_by(SophiaG, precision)


def test_the_pass_that_estimates_the_hessian_is_in_the_timeline_behind_the_step() -> None:
    names = [moment.moment for moment in _estimated().timeline]
    step = names.index("optimizer step")
    second = names[step + 1 :]
    assert second
    assert all("Hessian" in name for name in second)
    assert not any("Hessian" in name for name in names[:step])
    assert "Hessian loss backward" in second


def test_its_name_for_the_trainer_is_the_authors() -> None:
    assert _estimated(optimizer="SophiaG").peak == _estimated().peak


def test_clipping_is_in_both_passes_or_in_none() -> None:
    names = [moment.moment for moment in _estimated(loop={"max_grad_norm": 0}).timeline]
    assert not any("clipping" in name for name in names)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"loss": "fused_linear"}, "loss 'fused_linear'"),
        ({"kernels": ["compile"]}, "kernels"),
        ({"packing": True, "attention": "flash_attention_2"}, "packing"),
        ({"method": "ia3"}, "method 'ia3'"),
        ({"precision": "amp_fp16"}, "precision 'amp_fp16'"),
        ({"precision": "master_bf16"}, "precision 'master_bf16'"),
        ({"loop": {"ema": "cuda"}}, "loop.ema"),
        ({"loop": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"software": {"framework": "trl", "version": "1.16"}, "loss": "chunked"}, "loss"),
        ({"optimizer": {"name": "sophia", "in_backward": True}}, "in_backward"),
    ],
)
def test_what_the_pass_was_not_compared_with_is_refused_by_name(
    others: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedCombinationError, match=said):
        _estimated(**others)


def test_a_waterfall_ends_at_its_peak() -> None:
    asked = {"method": "lora", "activation_checkpointing": "full", "waterfall": True}
    result = _estimated(**asked)
    assert result.waterfall
    assert any("second forward and backward" in note for note in result.notes)


def _estimated(**others: Any) -> Any:
    return estimate({"model": {"config": TOY}, "optimizer": "sophia", **others})
