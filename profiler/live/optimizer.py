"""The optimizer of a live run: the object that steps, and what the Trainer's arguments say."""

from __future__ import annotations

from typing import Any, Final

from msgspec import structs

from estimator.optimizer import Optimizer
from estimator.request import OPTIM_ALIASES
from profiler.live.findings import Findings

# Packages whose optimizers the Trainer builds from `optim`, and which hold what `optim` says.
_BUILT_BY_THE_TRAINER: Final = (
    "transformers", "torchao", "galore_torch", "apollo_torch", "lomo_optim", "grokadamw",
    "schedulefree", "optimi",
)  # fmt: skip
_OF_TORCH: Final = {
    "AdamW": "adamw", "Adam": "adam", "NAdam": "nadam", "RAdam": "radam", "SGD": "sgd",
    "Adagrad": "adagrad", "RMSprop": "rmsprop", "Adafactor": "torch_adafactor",
}  # fmt: skip
# Its Adam and AdamW differ by weight decay alone.
_OF_BITSANDBYTES: Final = {
    "Adam": "adamw",
    "AdamW": "adamw", "AdEMAMix": "ademamix", "Lion": "lion", "RMSprop": "rmsprop_bnb",
    "Adagrad": "adagrad", "SGD": "sgd", "LAMB": "lamb", "LARS": "lars",
}  # fmt: skip
# Arguments of `optim_args` that cost no memory, beside those that the request knows.
_NO_MEMORY: Final = frozenset(
    {
        "update_proj_gap", "scale", "proj", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps",
        "dampening", "weight_decay", "lr_decay", "alpha_init", "lamb", "gamma", "gradient_clipping",
        "grokking_signal_decay_rate", "weight_lr_power", "r", "decouple_lr", "max_lr",
    }
)  # fmt: skip

_DEFAULTS: Final = ("block_size=256", "proj_type=std")


def optimizer(args: Any, live: Any, findings: Findings) -> dict[str, Any]:
    """Return the section `optimizer` of a live run.

    Args:
        args: the Trainer's arguments.
        live: the optimizer that will step, in Accelerate's wrapper or not.
    """
    while type(live).__name__ == "AcceleratedOptimizer":
        live = live.optimizer
    kind = type(live)
    package = kind.__module__.partition(".")[0]
    if package == "torch" and kind.__name__ in _OF_TORCH:
        return _of_torch(live)
    if package == "bitsandbytes":
        return _of_bitsandbytes(live, findings)
    if package in _BUILT_BY_THE_TRAINER:
        return _of_arguments(args, live, findings)
    findings.unknown.append(f"the optimizer {kind.__module__}.{kind.__qualname__}")
    return {"name": "adamw"}


def _of_torch(live: Any) -> dict[str, Any]:
    """Read torch's own optimizers; on a GPU they take the foreach operators by themselves."""
    group = live.param_groups[0]
    section: dict[str, Any] = {"name": _OF_TORCH[type(live).__name__]}
    if section["name"] != "torch_adafactor":
        if group.get("fused"):
            section["implementation"] = "fused"
        else:
            section["implementation"] = "single" if group.get("foreach") is False else "foreach"
    for knob in ("amsgrad", "momentum", "nesterov", "centered"):
        if group.get(knob):
            section[knob] = group[knob]
    return section


def _of_bitsandbytes(live: Any, findings: Findings) -> dict[str, Any]:
    """Read the optimizers of bitsandbytes: how many bits, paged or not."""
    kind = type(live).__name__.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    name = _OF_BITSANDBYTES.get(kind)
    if name is None:
        findings.unknown.append(f"the optimizer bitsandbytes.optim.{type(live).__name__}")
        return {"name": "adamw"}
    bits = live.args.optim_bits
    full = f"{'paged_' if live.is_paged else ''}{name}_{bits}bit"
    section: dict[str, Any] = {"name": "ademamix" if full == "ademamix_32bit" else full}
    momentum = live.param_groups[0].get("momentum")
    if momentum and name in ("sgd", "lars"):
        section["momentum"] = momentum
    return section


def _of_arguments(args: Any, live: Any, findings: Findings) -> dict[str, Any]:
    """Return what `optim` and `optim_args` say."""
    name = str(getattr(args.optim, "value", args.optim)).lower()
    section: dict[str, Any] = dict(OPTIM_ALIASES.get(name, {"name": name}))
    knobs = {each.name: each for each in structs.fields(Optimizer)}
    for knob, text in _pairs(args.optim_args).items():
        if knob in knobs and knob != "name":
            section[knob] = _value(text)
        elif knob not in _NO_MEMORY and f"{knob}={text}" not in _DEFAULTS:
            findings.unknown.append(f"{knob}={text} of optim_args")
    if args.optim_target_modules is not None and not _all_linear(args.optim_target_modules):
        findings.assumed.append(
            f"optimizer {name!r} is taken to project every linear layer; optim_target_modules "
            f"names {args.optim_target_modules}"
        )
    if section["name"] == "adafactor" and live.param_groups[0].get("beta1"):
        section["beta1"] = live.param_groups[0]["beta1"]
    return section


def _all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.replace("_", "-") == "all-linear"


def _pairs(text: str | None) -> dict[str, str]:
    """Return what `optim_args` holds, read as the Trainer reads it."""
    given = (each.partition("=") for each in (text or "").replace(" ", "").split(",") if each)
    return {key: value for key, _, value in given}


def _value(text: str) -> Any:
    """Return a knob's value: a truth value, a number, or the word itself."""
    if text.lower() in ("true", "false", "yes", "no"):
        return text.lower() in ("true", "yes")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
