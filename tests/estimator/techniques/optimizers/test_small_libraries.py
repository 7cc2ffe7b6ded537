"""States of optimizers from small libraries, counted on the real ones after a real step."""

from __future__ import annotations

import pytest

from tests.estimator.techniques.optimizers.real import kept_by, kept_in_the_answer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lion_keeps_what_that_of_lion_pytorch_keeps(precision: str) -> None:
    from lion_pytorch import Lion

    assert kept_in_the_answer({"name": "lion"}, precision) == kept_by(Lion, precision)


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("radam", "RAdam"), ("sgd", "SGD")])
def test_schedule_free_optimizers_keep_what_those_of_schedulefree_keep(
    name: str, kind: str
) -> None:
    import schedulefree

    def build(parameters: object) -> object:
        optimizer = getattr(schedulefree, f"{kind}ScheduleFree")(parameters)
        optimizer.train()
        return optimizer

    assert kept_in_the_answer({"name": f"schedule_free_{name}"}, "bf16") == kept_by(build, "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_galore_keeps_the_moments_and_the_storage_of_the_projectors_of_galore_torch(
    precision: str,
) -> None:
    import torch
    from galore_torch import GaLoreAdamW

    rank = {"rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizers = []

    def build(parameters: list[torch.Tensor]) -> object:
        # The embedding is the first parameter of a Llama model, and no linear layer.
        linear = [each for each in parameters[1:] if each.dim() == 2]
        others = [parameters[0], *(each for each in parameters if each.dim() == 1)]
        groups = [{"params": others}, {"params": linear, **rank}]
        optimizers.append(GaLoreAdamW(groups, no_deprecation_warning=True))
        return optimizers[0]

    moments = kept_by(build, precision)
    projectors = sum(
        state["projector"].ortho_matrix.untyped_storage().nbytes()
        for state in optimizers[0].state.values()
        if "projector" in state
    )
    ours = kept_in_the_answer({"name": "galore_adamw", "rank": 8}, precision)
    assert ours == moments + projectors


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stable_adamw_keeps_what_that_of_torch_optimi_keeps(precision: str) -> None:
    from optimi import StableAdamW

    def build(parameters: object) -> object:
        return StableAdamW(parameters, lr=1e-4, triton=False, foreach=False)

    asked = {"name": "stable_adamw", "implementation": "single"}
    assert kept_in_the_answer(asked, precision) == kept_by(build, precision)


def test_grokadamw_keeps_nothing_on_the_device_and_says_so() -> None:
    from estimator.service import estimate
    from tests.estimator.techniques.optimizers.real import TOY

    assert kept_in_the_answer({"name": "grokadamw"}, "bf16") == 0
    result = estimate({"model": {"config": TOY}, "optimizer": "grokadamw"})
    assert any("host memory" in note for note in result.notes)
