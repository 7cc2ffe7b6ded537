"""Prompt tuning: vectors before the text, and what a longer sequence costs."""

from __future__ import annotations

import pytest

from estimator.errors import InvalidRequestError
from estimator.pipeline import answer
from estimator.request import parse_request
from estimator.resolve import resolve
from tests.conformance.cases import MODELS
from tests.conformance.counts import THREE, counted_by_peft, counted_here

METHOD = {"name": "prompt_tuning", "num_virtual_tokens": 8}


@pytest.mark.parametrize("model", THREE)
def test_the_parameters_are_those_that_peft_counts(model: str):
    assert counted_here(METHOD, model) == counted_by_peft(METHOD, model)


def test_bloomz_560m_trains_what_the_documentation_of_peft_prints():
    # peft, docs/source/task_guides/prompt_based_methods.md: 8 virtual tokens on bloomz-560m.
    config = {
        "model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16,
        "vocab_size": 250_880,
    }  # fmt: skip
    request = parse_request({"model": {"config": config}, "method": METHOD})
    spec = resolve(request, config, "bloomz-560m").spec
    assert spec.trainable_parameters() == 8192
    assert spec.total_parameters() == 559_222_784


def test_virtual_tokens_count_against_the_table_of_positions():
    config = MODELS["gpt2"]
    document = {"model": {"config": config}, "method": METHOD, "seq_len": 1017}
    with pytest.raises(InvalidRequestError, match="8 virtual tokens"):
        answer(parse_request(document), config, "gpt2", None)


def test_a_virtual_token_costs_what_a_token_of_text_costs_in_the_layers():
    config = MODELS["llama"]

    def peak(seq_len: int, tokens: int) -> int:
        method = {"name": "prompt_tuning", "num_virtual_tokens": tokens}
        document = {"model": {"config": config}, "method": method, "seq_len": seq_len}
        return answer(parse_request(document), config, "llama", None).peak.allocated_bytes.expected

    longer, more_virtual = peak(1128, 24), peak(1000, 152)
    assert longer == pytest.approx(more_virtual, rel=0.002)
