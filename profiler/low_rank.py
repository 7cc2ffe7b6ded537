"""Optimizers that project gradients to a low rank, as the Trainer builds them."""

from __future__ import annotations

from typing import Any
from unittest import mock

from estimator.optimizer import Optimizer


def galore(
    library: Any, model: Any, groups: list[dict[str, Any]], asked: Optimizer, lr: float
) -> Any:
    """Return GaLore's AdamW over all linear layers; projectors are renewed at every step."""
    chosen = split(model, groups, galore_settings(asked))
    return library.GaLoreAdamW(chosen, lr=lr, no_deprecation_warning=True)


def galore_8bit(
    library: Any, model: Any, groups: list[dict[str, Any]], asked: Optimizer, lr: float
) -> Any:
    """Return GaLore over 8-bit Adam of bitsandbytes; its step waits for CUDA, which is not here."""
    import torch
    from bitsandbytes import functional, optim
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    update = functional.optimizer_update_32bit

    def unlimited(*args: Any, max_unorm: float, **kwargs: Any) -> None:
        # The norm of a small weight is read from the device; a fake one has no value.
        update(*args, max_unorm=0.0, **kwargs)

    class Waitless(library.GaLoreAdamW8bit):  # type: ignore[misc]  # it has no types
        def step(self, closure: Any = None) -> Any:
            with (
                mock.patch.object(torch.cuda, "synchronize"),
                mock.patch.object(functional, "optimizer_update_32bit", unlimited),
            ):
                return super().step(closure)

    with unset_fake_temporarily():
        # Its code books are computed from data when it is built.
        optimizer = Waitless(split(model, groups, galore_settings(asked)), lr=lr)
    optimizer.name2qmap = {
        name: torch.ones(table.numel()) for name, table in optimizer.name2qmap.items()
    }
    # The manager is one for the whole process and remembers parameters by their address.
    manager = object.__new__(optim.GlobalOptimManager)
    manager.initialize()
    optimizer.mng = manager
    return optimizer


def galore_adafactor(
    library: Any, model: Any, groups: list[dict[str, Any]], asked: Optimizer, lr: float
) -> Any:
    """Return GaLore over Adafactor, with the Trainer's two settings."""
    chosen = split(model, groups, galore_settings(asked))
    return library.GaLoreAdafactor(chosen, lr=lr, scale_parameter=False, relative_step=False)


def apollo(
    library: Any, model: Any, groups: list[dict[str, Any]], asked: Optimizer, lr: float
) -> Any:
    """Return APOLLO over all linear layers; projectors are drawn anew at every step.

    The seed of the next projector is a number that is read out of a tensor on the host; fake ones
    have none, so here it is the next integer.
    """
    from apollo_torch import random_projector  # type: ignore[import-untyped]  # it has no types

    random_projector.next_seed = lambda seed: seed + 1
    return library.APOLLOAdamW(split(model, groups, apollo_settings(asked)), lr=lr)


def galore_settings(asked: Optimizer) -> dict[str, Any]:
    """Return what GaLore is told of projected weights."""
    return {"rank": asked.rank, "update_proj_gap": 1, "scale": 0.25, "proj_type": "std"}


def apollo_settings(asked: Optimizer) -> dict[str, Any]:
    """Return what APOLLO is told of projected weights."""
    return {
        "rank": asked.rank,
        "proj": "random",
        "scale_type": asked.scale_type or "channel",
        "update_proj_gap": 1,
        "scale": 1.0,
        "proj_type": "std",
    }


def split(
    model: Any, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what is not projected, and the weights of linear layers with their settings.

    Source: transformers, trainer_optimizer.py, _setup_low_rank_optimizer.
    """
    import torch

    targets = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)
    }
    # A tied head goes by the name of the table.
    targets -= {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    parameters = [parameter for group in groups for parameter in group["params"]]
    split = (
        {"params": [each for each in parameters if id(each) not in targets]},
        {"params": [each for each in parameters if id(each) in targets], **settings},
    )
    return [group for group in split if group["params"]]
