"""FOAK kernels: where they are refused, and what fused adapters save."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate

MISTRAL = "mistralai/Mistral-7B-v0.1"
ATTENTION = {"name": "lora", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
OVER_NF4 = {
    "method": ATTENTION, "software": {"version": "4"}, "autocast": "bf16",
    "quantization": {"name": "nf4", "prepare_kbit": False},
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"software": {"version": "5"}},
        {"model": "Qwen/Qwen2-7B", "software": {"version": "4"}},
        {"method": "qlora", "software": {"version": "4"}},
        {"loss": "cut_cross_entropy", "software": {"version": "4"}},
        {**OVER_NF4, "quantization": {"name": "nf4", "double_quant": False}},
        {**OVER_NF4, "quantization": "int8"},
        {**OVER_NF4, "method": {"name": "lora", "target_modules": ["q_proj", "v_proj"]}},
        {**OVER_NF4, "method": {**ATTENTION, "use_dora": True}},
    ],
)
def test_foak_is_refused_where_it_has_no_source(fields):
    request = parse_request({"model": MISTRAL, "kernels": ["foak"], **fields})
    config = find_model(request.model, Access.CATALOGUE).config
    with pytest.raises(UnsupportedCombinationError, match="foak"):
        resolve(request, config, request.model)


@pytest.mark.parametrize(
    "changes", [{"quantization": {"name": "nf4"}}, {"autocast": None}, {"autocast": "fp16"}]
)
def test_fused_adapters_want_weights_and_autocast_of_one_half_precision(changes):
    document = {"model": MISTRAL, "kernels": ["foak"], **OVER_NF4, **changes}
    with pytest.raises(UnsupportedCombinationError, match="FOAK's fused adapters"):
        estimate(parse_request(document))


def test_a_group_of_fused_adapters_saves_one_dropped_input_for_each_layer():
    """`save_for_backward` of LoRA_QKV holds X, QX, KX and VX; without dropout all four are X.

    Source: fms-acceleration, fused_ops/unsloth_lora/bnb/fast_lora.py at 876e2ed.
    """
    tokens, hidden, layers = 512, 4096, 32
    peaks = [
        estimate(
            parse_request({
                "model": MISTRAL, "kernels": ["foak"], **OVER_NF4, "seq_len": tokens,
                "method": {**ATTENTION, "r": 8, "lora_dropout": dropout},
            })
        ).timeline
        for dropout in (0.0, 0.1)
    ]  # fmt: skip
    without, dropped = ({each.moment: each.bytes for each in peak} for peak in peaks)
    more = dropped["loss forward"] - without["loss forward"]
    assert more == 4 * layers * 2 * tokens * hidden
