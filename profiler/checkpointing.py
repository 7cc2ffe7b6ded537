"""Activation checkpointing made real: transformers' own switch, torch's own selective contexts.

Where tensors go to host memory, operators of our own stand for the copies: all tensors of the dry
run are on one device, so that a real copy would be none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from estimator.eager.checkpoint import Checkpointing

_LIBRARY = torch.library.Library("vramplan", "DEF")
_LIBRARY.define("to_host(Tensor tensor) -> Tensor")
_LIBRARY.define("to_device(Tensor tensor) -> Tensor")
for _name in ("to_host", "to_device"):
    _LIBRARY.impl(_name, lambda tensor: tensor.clone(), "CompositeExplicitAutograd")
TO_HOST = torch.ops.vramplan.to_host.default
TO_DEVICE = torch.ops.vramplan.to_device.default

aten = torch.ops.aten
# torchtitan, models/llama3/infra/parallelize.py, _op_sac_save_list, as far as these operators occur
# on one GPU.
_SAVED = frozenset(
    {
        aten.mm.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._flash_attention_forward.default,
        aten.max.default,
    }
)


def enable(model: Any, how: Checkpointing) -> None:
    """Switch on what a request asks for, as the Trainer does; `attention` waits for the step."""
    if how.scope != "layers":
        return
    settings: dict[str, Any] = {"use_reentrant": bool(how.reentrant)}
    if how.saves_products:
        settings["context_fn"] = _selective_contexts
    model.activation_checkpointing_enable(settings, every_n_layers=how.every, offload=how.offload)


def _selective_contexts() -> Any:
    """Return torch's contexts with torchtitan's policy: save all of the list but every second mm.

    Source: torchtitan at commit cfb932651530, distributed/activation_checkpoint.py, _apply_op_sac.
    """
    products = 0

    def policy(_: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal products
        products += func is aten.mm.default
        saves = func in _SAVED and not (func is aten.mm.default and products % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class SaveOnHost(torch.autograd.graph.saved_tensors_hooks):  # type: ignore[misc]
    """What stands for `torch.autograd.graph.save_on_cpu`."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        super().__init__(TO_HOST, TO_DEVICE)


@contextlib.contextmanager
def running(how: Checkpointing | None, *, fake: bool) -> Iterator[None]:
    """Let a step run: attention is checkpointed by itself; fake copies to the host are seen."""
    from transformers import modeling_utils

    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(mock.patch.object(modeling_utils, "save_on_cpu", SaveOnHost))
        if how is not None and how.scope == "attention":
            functions = type(modeling_utils.ALL_ATTENTION_FUNCTIONS)
            found = functions.get_interface

            def checkpointed(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
                return _checkpointed(found(self, *args, **kwargs))

            stack.enter_context(mock.patch.object(functions, "get_interface", checkpointed))
        yield


def forward_context(
    how: Checkpointing | None, *, fake: bool
) -> contextlib.AbstractContextManager[Any]:
    """Return the context that a hand-written loop puts around the forward pass."""
    if how is not None and how.scope == "none" and how.offload:
        hooks = SaveOnHost if fake else torch.autograd.graph.save_on_cpu
        context: contextlib.AbstractContextManager[Any] = hooks(pin_memory=True)
        return context
    return contextlib.nullcontext()


def _checkpointed(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention function of transformers that is recomputed in backward.

    The weights that it returns beside its output are dropped, as nobody reads them.
    """

    def function(module: Any, query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> Any:
        def core(query: Any, key: Any, value: Any) -> Any:
            return attention(module, query, key, value, *rest, **kwargs)[0]

        return checkpoint(core, query, key, value, use_reentrant=False), None

    return function
