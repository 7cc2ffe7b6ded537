"""States of Muon and of the AdamW beside it, counted on the real ones after a real step."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import TOY, kept_by, kept_in_the_answer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_keeps_what_those_of_torch_keep_over_hidden_matrices_and_the_rest(
    precision: str,
) -> None:
    import torch

    from profiler.together import Together

    def build(parameters: list[Any]) -> Any:
        # The table is the first parameter of a Llama model, the head the last.
        table, *body, head = parameters
        hidden = [each for each in body if each.ndim == 2]
        others = [table, head, *(each for each in body if each.ndim == 1)]
        return Together([torch.optim.Muon(hidden), torch.optim.AdamW(others)])

    assert kept_in_the_answer({"name": "muon"}, precision) == kept_by(build, precision)


def test_the_answer_says_who_updates_what() -> None:
    result = estimate({"model": {"config": TOY}, "optimizer": "muon"})
    assert any("AdamW beside it" in note for note in result.notes)


def test_muon_is_refused_over_master_copies() -> None:
    request: dict[str, Any] = {
        "model": {"config": TOY}, "optimizer": "muon", "precision": "master_bf16",
    }  # fmt: skip
    with pytest.raises(UnsupportedCombinationError, match="'muon' with precision 'master_bf16'"):
        estimate(request)
