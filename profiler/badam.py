"""BAdam's own optimizer of blocks around the one of the request, at the turn of the first layer."""

from __future__ import annotations

from typing import Any, Final
from unittest import mock

# Longer than any run here: the turn does not end.
_STEPS: Final = 10**9


class Blocks:
    """`badam.BlockOptimizer` as LLaMA-Factory builds it.

    Source: LLaMA-Factory, train/trainer_utils.py, _create_badam_optimizer.
    """

    def __init__(self, library: Any, model: Any, base: Any) -> None:
        self.inner = base
        with mock.patch.object(library, "print_rank_0"):
            self.blocks = library.BlockOptimizer(
                base_optimizer=base,
                named_parameters_list=list(model.named_parameters()),
                switch_block_every=_STEPS,
                start_block=0,
                switch_mode="fixed",
                verbose=0,
            )
        halves, copies = self.blocks.param_idx2lp, self.blocks.param_idx2hp
        self.masters = list(zip(halves.values(), copies.values(), strict=True))
        self.defaults: dict[str, Any] = base.defaults

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """States by model parameter, the fp32 copy among them."""
        kept = self.inner.state
        return {half: {"master": copy, **kept.get(copy, {})} for half, copy in self.masters}

    def step(self) -> None:
        """Copy gradients over, update the copies, write them back, drop the gradients."""
        self.blocks.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model."""
        self.blocks.zero_grad(set_to_none=set_to_none)
