"""The optimizer of usamec/lowmem_finetuning, operator by operator, to be run on fake tensors.

The package has no release to install; what is here makes the same tensors in the same order
(utils.py, adafactor_step and add_scaled_bf16 at 6d8dc10f).
"""

from __future__ import annotations

from typing import Any

BETA2 = 0.99
EPSILON = 1e-30


def optimizer(groups: list[dict[str, Any]], lr: float) -> Any:
    """Return the optimizer over parameter groups; weights in bf16 are rounded stochastically."""
    import torch

    class LowmemAdafactor(torch.optim.Optimizer):  # type: ignore[misc]  # torch is not typed here
        @torch.no_grad()  # type: ignore[untyped-decorator]
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _update(parameter, self.state[parameter], lr)

    return LowmemAdafactor(groups, {"lr": lr})


def _update(parameter: Any, state: dict[str, Any], lr: float) -> None:
    import torch

    grad = parameter.grad
    if grad.dim() < 2:
        moment = state.setdefault("v", torch.zeros_like(grad)) if "v" not in state else state["v"]
        moment.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = moment.sqrt().add_(EPSILON)
    else:
        if "vr" not in state:
            state["vr"] = grad.new_zeros(grad.shape[:-1])
            state["vc"] = grad.new_zeros(grad.shape[-1])
        rows, columns = state["vr"], state["vc"]
        matrix = grad.flatten(0, -2)
        square = matrix.pow(2)
        rows.mul_(BETA2).add_(square.mean(dim=-1), alpha=1 - BETA2)
        columns.mul_(BETA2).add_(square.mean(dim=0), alpha=1 - BETA2)
        outer = (rows.unsqueeze(-1) * columns.unsqueeze(0)).div(rows.mean()).sqrt()
        denominator = outer.add_(EPSILON).view_as(matrix).reshape_as(grad)
        del outer
    update = grad / denominator
    update = update / (update.norm() + 1e-20) * parameter.data.norm()
    if parameter.dtype is torch.bfloat16:
        parameter.copy_(_rounded(parameter.data, update, -lr))
    else:
        parameter.add_(update, alpha=-lr)


def _rounded(weight: Any, update: Any, scale: float) -> Any:
    """Return `weight + scale * update`, rounded to one of its neighbours by chance."""
    import torch

    move = scale * update
    nearest = weight + move
    moved = nearest - weight
    error = moved - move
    beyond = torch.where(error > 0, -torch.inf, torch.inf).to(torch.bfloat16)
    farther = torch.nextafter(nearest, beyond)
    del beyond
    gap = torch.abs(farther - nearest)
    chance = torch.rand_like(nearest)
    takes_farther = chance * gap < torch.abs(error)
    return torch.where(takes_farther, farther, nearest)
