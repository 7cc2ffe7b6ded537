"""What clipping holds, against torch's own kernels and the Trainer's default."""

from __future__ import annotations

import pytest

from estimator.request import EstimateRequest, parse_request
from estimator.service import estimate

LLAMA = "meta-llama/Llama-3.1-8B"
MOMENT = "gradient clipping"


def _moments(**recipe: object) -> dict[str, int]:
    result = estimate({"model": LLAMA, **recipe})
    return {each.moment: each.bytes for each in result.timeline}


def test_the_trainer_clips_by_default_at_the_norm_that_we_assume():
    transformers = pytest.importorskip("transformers")
    default = transformers.TrainingArguments.__dataclass_fields__["max_grad_norm"].default
    assert EstimateRequest(model="").loop.max_grad_norm == default


def test_partial_sums_are_as_many_for_each_tensor_as_the_largest_has_chunks():
    """ForeachReduceOp.cu: n * max_chunks fp32 numbers, chunks of 65,536; and n norms in bf16."""
    result = estimate({"model": LLAMA, "optimizer": "adamw_torch_fused"})
    held = {each.moment: each.components["workspace"] for each in result.timeline}
    tensors, chunks = 291, 128256 * 4096 // 65536
    norms_and_sums = 2 * tensors + 4 * tensors * chunks
    assert held[MOMENT] - held["end of backward"] == norms_and_sums


@pytest.mark.parametrize(
    "recipe",
    [
        {"loop": {"max_grad_norm": 0}},
        {"optimizer": {"name": "adamw", "in_backward": True}},
        {"optimizer": "lomo"},
        {"precision": "master_bf16"},
        {"method": "mezo"},
    ],
)
def test_where_no_gradients_are_clipped_there_is_no_such_moment(recipe: dict[str, object]):
    assert MOMENT not in _moments(**recipe)


def test_lit_gpt_does_not_clip():
    request = {"model": "meta-llama/Llama-2-7b-hf", "software": "litgpt", "method": "lora"}
    assert MOMENT not in [each.moment for each in estimate(request).timeline]


def test_a_negative_norm_is_refused():
    with pytest.raises(Exception, match="loop/max_grad_norm"):
        parse_request({"model": LLAMA, "loop": {"max_grad_norm": -1.0}})
