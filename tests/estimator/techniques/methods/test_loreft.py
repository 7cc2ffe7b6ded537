"""LoReFT: shares that the paper prints, counts of the dry run's modules, what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from tests.conformance.cases import MODELS

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000,
}  # fmt: skip
LLAMA_13B = {
    "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13_824,
    "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 32_000,
}  # fmt: skip
COMMONSENSE = {"r": 8, "positions": "f7+l7", "share_weights": True}
INSTRUCT = {"r": 4, "positions": "f5+l5", "layers": [3, 9, 18, 24]}


def _counts(config: dict[str, Any], **knobs: Any) -> tuple[int, int]:
    request = parse_request({"model": {"config": config}, "method": {"name": "loreft", **knobs}})
    spec = resolve(request, config, "model").spec
    trainable = spec.trainable_parameters()
    return trainable, spec.total_parameters() - trainable


# wu2024reft: table 1 (commonsense, LLaMA-7B and -13B) and table 3 (instructions, Llama-2 7B),
# column "Params (%)"; settings of appendix D.
@pytest.mark.parametrize(
    ("config", "knobs", "percent", "places"),
    [
        (LLAMA_7B, COMMONSENSE, 0.031, 3),
        (LLAMA_13B, COMMONSENSE, 0.025, 3),
        (LLAMA_7B, INSTRUCT, 0.0039, 4),
    ],
)
def test_the_trained_share_is_what_the_paper_prints(config, knobs, percent, places):
    trainable, base = _counts(config, **knobs)
    assert round(100 * trainable / base, places) == percent


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_the_modules_of_the_dry_run_have_as_many_parameters(family):
    from profiler.workload import meta_model, model_config

    config, knobs = MODELS[family], {"r": 3, "layers": [0, 2]}
    request = parse_request({"model": {"config": config}, "method": {"name": "loreft", **knobs}})
    model = meta_model(request, model_config(dict(config)))
    counted = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert _counts(config, **knobs)[0] == counted


def test_each_intervention_keeps_a_square_matrix_as_torch_does():
    import torch

    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(24, 4, bias=False))
    assert layer.parametrizations.weight[0].base.shape == (24, 24)
    result = estimate({"model": {"config": LLAMA_7B}, "method": "loreft"})
    (row,) = (
        row
        for part in result.breakdown
        if part.component == "buffers"
        for row in part.rows
        if "intervention.0" in row.name
    )
    assert (row.count, row.bytes) == (32, 32 * 4096 * 4096 * 4)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"layers": [32]}, "layers 0 to 31"),
        ({"positions": "all"}, "as in f7"),
        ({"positions": "f0+l0"}, "as in f7"),
    ],
)
def test_what_says_nothing_is_refused(knobs, said):
    with pytest.raises(InvalidRequestError, match=said):
        _counts(LLAMA_7B, **knobs)
