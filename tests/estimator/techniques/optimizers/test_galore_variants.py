"""States of GaLore under 8-bit Adam and Adafactor, counted on galore-torch after a real step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.service import estimate
from tests.estimator.techniques.optimizers.real import kept_by, kept_in_the_answer

RANK = {"rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def _groups(parameters: list[Any]) -> list[dict[str, Any]]:
    # The embedding is the first parameter of a Llama model, and no linear layer.
    linear = [each for each in parameters[1:] if each.dim() == 2]
    others = [parameters[0], *(each for each in parameters if each.dim() == 1)]
    return [{"params": others}, {"params": linear, **RANK}]


def _projectors(optimizer: Any) -> int:
    return sum(
        state["projector"].ortho_matrix.untyped_storage().nbytes()
        for state in optimizer.state.values()
        if "projector" in state
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_galore_adafactor_keeps_the_factors_and_fp32_projectors_of_galore_torch(
    precision: str,
) -> None:
    from galore_torch import GaLoreAdafactor

    optimizers = []

    def build(parameters: list[Any]) -> Any:
        optimizers.append(
            GaLoreAdafactor(
                _groups(parameters), lr=1e-5, scale_parameter=False, relative_step=False
            )
        )
        return optimizers[0]

    kept = kept_by(build, precision)
    ours = kept_in_the_answer({"name": "galore_adafactor", "rank": 8}, precision)
    assert ours == kept + _projectors(optimizers[0])


def test_galore_8_bit_keeps_the_codes_and_scales_of_galore_torch() -> None:
    import torch
    from bitsandbytes import functional
    from galore_torch import GaLoreAdamW8bit

    optimizers = []

    def build(parameters: list[Any]) -> Any:
        optimizers.append(GaLoreAdamW8bit(_groups(parameters), lr=1e-5))
        return optimizers[0]

    with (
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(functional, "optimizer_update_32bit"),
        mock.patch.object(functional, "optimizer_update_8bit_blockwise"),
    ):
        kept = kept_by(build, "bf16")
    optimizer = optimizers[0]
    # Every moment refers to the code books, of which there is one for the whole optimizer.
    books = sum(
        state[name].nbytes
        for state in optimizer.state.values()
        for name in ("qmap1", "qmap2")
        if name in state
    )
    ours = kept_in_the_answer({"name": "galore_adamw_8bit", "rank": 8}, "bf16")
    assert ours == kept - books + _projectors(optimizer)


def test_what_was_not_compared_is_refused_by_name() -> None:
    document = {"model": "gpt2", "precision": "master_bf16", "optimizer": "galore_adamw_8bit"}
    with pytest.raises(UnsupportedCombinationError, match="galore_adamw_8bit"):
        estimate(document)
    with pytest.raises(UnsupportedCombinationError, match="relative steps"):
        estimate({"model": "gpt2", "optimizer": "galore_adafactor_layerwise"})
