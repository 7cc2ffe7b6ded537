"""States of APOLLO, counted on the optimizer of apollo-torch after a real step."""

from __future__ import annotations

import pytest

from tests.estimator.techniques.optimizers.real import kept_by, kept_in_the_answer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rank", "scale_type"), [(8, "channel"), (80, "channel"), (1, "tensor")])
def test_apollo_keeps_moments_projectors_and_norms_of_apollo_torch(
    precision: str, rank: int, scale_type: str
) -> None:
    import torch
    from apollo_torch import APOLLOAdamW

    settings = {"rank": rank, "proj": "random", "scale_type": scale_type, "scale": 1.0}
    settings |= {"update_proj_gap": 200, "proj_type": "std"}
    optimizers = []

    def build(parameters: list[torch.Tensor]) -> object:
        # The embedding is the first parameter of a Llama model, and no linear layer.
        linear = [each for each in parameters[1:] if each.dim() == 2]
        others = [parameters[0], *(each for each in parameters if each.dim() == 1)]
        optimizers.append(APOLLOAdamW([{"params": others}, {"params": linear, **settings}]))
        return optimizers[0]

    kept = kept_by(build, precision)
    projectors = sum(
        state["projector"].ortho_matrix.untyped_storage().nbytes()
        for state in optimizers[0].state.values()
        if "projector" in state
    )
    asked = {"name": "apollo_adamw", "rank": rank, "scale_type": scale_type}
    assert kept_in_the_answer(asked, precision) == kept + projectors


def test_apollo_mini_is_rank_1_with_one_factor_for_a_matrix() -> None:
    mini = kept_in_the_answer({"name": "apollo_mini"}, "bf16")
    written_out = {"name": "apollo_adamw", "rank": 1, "scale_type": "tensor"}
    assert mini == kept_in_the_answer(written_out, "bf16")
