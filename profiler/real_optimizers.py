"""Optimizers whose libraries need a hand on fake tensors and none on a device, as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from estimator.optimizer import Optimizer
from estimator.techniques.optimizers.bitsandbytes import BITSANDBYTES
from profiler import low_rank
from profiler.optimizer_library import LEARNING_RATE, library, refuse_implementation

Groups = list[dict[str, Any]]


def _bitsandbytes(model: Any, groups: Groups, asked: Optimizer) -> Any:
    """Return bitsandbytes' optimizer; with 8-bit states, embeddings keep 32-bit ones (Trainer)."""
    import torch

    optim = library("bitsandbytes.optim", "bitsandbytes", asked)
    refuse_implementation(asked)
    kind = asked.name.removeprefix("paged_")
    bits = 8 if kind.endswith("_8bit") else 32
    kind = kind.removesuffix("_8bit").removesuffix("_32bit")
    settings: dict[str, Any] = {"lr": LEARNING_RATE, "optim_bits": bits}
    if kind in ("sgd", "lars"):
        settings["momentum"] = asked.momentum
    if asked.name.startswith("paged_"):
        settings["is_paged"] = True
    optimizer = getattr(optim, BITSANDBYTES_CLASSES[kind])(groups, **settings)
    if bits == 8:  # as `optim_bits` is written
        manager = optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _galore_8bit(model: Any, groups: Groups, asked: Optimizer) -> Any:
    refuse_implementation(asked)
    galore = library("galore_torch", "galore-torch", asked)
    return galore.GaLoreAdamW8bit(
        low_rank.split(model, groups, low_rank.galore_settings(asked)), lr=LEARNING_RATE
    )


def _apollo(model: Any, groups: Groups, asked: Optimizer) -> Any:
    refuse_implementation(asked)
    apollo = library("apollo_torch", "apollo-torch", asked)
    return apollo.APOLLOAdamW(
        low_rank.split(model, groups, low_rank.apollo_settings(asked)), lr=LEARNING_RATE
    )


def _torchao(_: Any, groups: Groups, asked: Optimizer) -> Any:
    """Return torchao's AdamW with the Trainer's block; it compiles its step itself."""
    refuse_implementation(asked)
    adam = library("torchao.optim.adam", "torchao", asked)
    kind = {"8bit": "AdamW8bit", "4bit": "AdamW4bit", "fp8": "AdamWFp8"}
    name = kind.get(asked.name.removeprefix("adamw_torch_"), "_AdamW")
    blocks = {} if name == "_AdamW" else {"block_size": 256}
    return getattr(adam, name)(
        groups, lr=LEARNING_RATE, bf16_stochastic_round=asked.bf16_stochastic_round, **blocks
    )


def _torchao_cpu_offload(_: Any, groups: Groups, asked: Optimizer) -> Any:
    refuse_implementation(asked)
    offload = library("torchao.optim.cpu_offload", "torchao", asked)
    return offload.CPUOffloadOptimizer(
        [dict(group) for group in groups],
        offload_gradients=asked.offload_gradients,
        minimal_size=asked.minimal_size,
        lr=LEARNING_RATE,
    )


def _stable_adamw(_: Any, groups: Groups, asked: Optimizer) -> Any:
    optimi = library("optimi", "torch-optimi", asked)
    chosen = asked.implementation or "fused"
    return optimi.StableAdamW(
        groups, lr=LEARNING_RATE, foreach=chosen == "foreach", triton=chosen == "fused"
    )


def _grokadamw(_: Any, groups: Groups, asked: Optimizer) -> Any:
    refuse_implementation(asked)
    return library("grokadamw", "grokadamw", asked).GrokAdamW(groups, lr=LEARNING_RATE)


# Our names of bitsandbytes' optimizers: the class that the Trainer, or a person, takes for each.
BITSANDBYTES_CLASSES: Final[dict[str, str]] = {
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "lion": "Lion",
    "rmsprop_bnb": "RMSprop",
    "adagrad": "Adagrad",
    "sgd": "SGD",
    "lamb": "LAMB",
    "lars": "LARS",
}

Builder = Callable[[Any, Groups, Optimizer], Any]


BUILDERS: Final[dict[str, Builder]] = {
    "galore_adamw_8bit": _galore_8bit,
    "apollo_adamw": _apollo,
    "torchao_adamw": _torchao,
    "torchao_cpu_offload": _torchao_cpu_offload,
    "adamw_torch_8bit": _torchao,
    "adamw_torch_4bit": _torchao,
    "adamw_torch_fp8": _torchao,
    "stable_adamw": _stable_adamw,
    "grokadamw": _grokadamw,
    **dict.fromkeys(BITSANDBYTES, _bitsandbytes),
}
"""What builds an optimizer on a device, where that is not what builds it on fake tensors."""
