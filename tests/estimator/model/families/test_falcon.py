"""Falcon: its three arrangements of heads and norms, what it refuses, and its attention."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidConfigError, UnsupportedCombinationError
from estimator.model.families import read_spec
from estimator.model.spec import ModelSpec, Norm
from estimator.service import estimate

ONE_KEY_HEAD: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 320,
}
GROUPED: dict[str, Any] = {
    **ONE_KEY_HEAD,
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
}
ALIBI: dict[str, Any] = {
    **ONE_KEY_HEAD,
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
}
ARRANGEMENTS = [
    ONE_KEY_HEAD,
    GROUPED,
    {**GROUPED, "num_ln_in_parallel_attn": 1},
    {**GROUPED, "num_kv_heads": None},
    ALIBI,
    {**ONE_KEY_HEAD, "multi_query": False},
    {**ONE_KEY_HEAD, "parallel_attn": False, "ffn_hidden_size": 96},
]


def _norms(spec: ModelSpec) -> set[str]:
    return {module.name for module in spec.kinds[0].modules if isinstance(module, Norm)}


@pytest.mark.parametrize("config", ARRANGEMENTS)
def test_every_arrangement_has_the_tensors_that_transformers_builds(
    config: dict[str, Any],
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    spec = read_spec(config, "model")
    ours = {
        f"{module.name}.{weight.name}": tuple(each.value for each in weight.shape)
        for module in spec.kinds[0].modules
        for weight in module.weights()
    }
    theirs = {name: tuple(each.shape) for name, each in real.transformer.h[1].named_parameters()}
    assert ours == theirs
    assert spec.total_parameters() == sum(each.numel() for each in real.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_attn": False, "new_decoder_architecture": True}, "parallel_attn=False"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads 5"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "no multiple of num_kv_heads 3"),
    ],
)
def test_what_the_forward_pass_of_transformers_fails_on_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        read_spec({**ONE_KEY_HEAD, **change}, "model")


def test_flash_attention_with_alibi_is_refused_as_transformers_refuses_it() -> None:
    with pytest.raises(UnsupportedCombinationError, match=r"flash_attention_2 .* falcon .* sdpa"):
        estimate({"model": {"config": ALIBI}, "attention": "flash_attention_2"})


def test_flash_attention_keeps_no_scores_where_sdpa_has_to() -> None:
    """With one key head sdpa has no fused kernel, because the model does not ask for groups."""
    sdpa, flash = (
        estimate(
            {"model": {"config": ONE_KEY_HEAD}, "seq_len": 1024, "attention": name}
        ).peak.allocated_bytes.expected
        for name in ("sdpa", "flash_attention_2")
    )
    scores = 4 * 4 * 1024 * 1024 * 4
    assert sdpa - flash > scores
