"""What training in 8-bit floats has in common: which linear layers another class takes over."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import Embedding, Linear, ModelSpec, Module, Norm
from estimator.run import Run
from estimator.section import Kind
from estimator.sources import Cite
from estimator.techniques.lora_adapter import LoraAdapter
from estimator.techniques.stage import Stage

_KNOWN: Final = "methods full, partial and lora"
_PEFT: Final = "base_model.model."


class Fp8(Kind, frozen=True):
    """Make the products of linear layers in 8-bit floats; nothing is stored in them."""

    stage: ClassVar[Stage] = Stage.KERNEL
    source: ClassVar[Cite]

    def apply(self, run: Run) -> Run:
        """Return the run with its linear layers taken over."""
        raise NotImplementedError


def refuse_unknown(run: Run, name: str) -> None:
    """Refuse what no source describes beside layers of another class.

    Raises:
        UnsupportedCombinationError: by name, with what to use instead.
    """
    if run.forward_only:
        raise UnsupportedCombinationError(
            f"fp8 {name!r} has no sourced answer for a step without backward; use {_KNOWN}"
        )
    for module, _ in run.spec.module_counts():
        if isinstance(module, Linear):
            _refuse_linear(module, name, run.spec)
        elif not isinstance(module, (Embedding, Norm)):
            raise UnsupportedCombinationError(
                f"fp8 {name!r} beside {module.name!r}, which is a module of the method's own, has "
                f"no sourced answer here yet; use {_KNOWN}"
            )


def _refuse_linear(linear: Linear, name: str, spec: ModelSpec) -> None:
    if linear.format is not None:
        raise UnsupportedCombinationError(
            f"fp8 {name!r} multiplies by plain weights, and {linear.name} is quantized; leave "
            "out fp8 or quantization"
        )
    if linear.adapter is not None and type(linear.adapter) is not LoraAdapter:
        raise UnsupportedCombinationError(
            f"fp8 {name!r} beside an adapter other than plain LoRA has no sourced answer here "
            f"yet; use {_KNOWN}"
        )
    if linear.keeps_original and linear.name != spec.head.name:
        raise UnsupportedCombinationError(
            f"fp8 {name!r} with {linear.name} in modules_to_save has no sourced answer here yet; "
            "train the head or norms there, or leave out fp8"
        )


def linear_paths(spec: ModelSpec) -> tuple[str, ...]:
    """Return the dotted path of every linear layer in the order in which the model has them."""
    found: dict[str, None] = {}

    def see(module: Module, path: str) -> Module:
        if isinstance(module, Linear):
            found[path] = None
        return module

    spec.map_paths(see, every_layer=True)
    # The head comes last, but the walk over the modules meets it before the layers.
    found.pop(spec.head.name)
    return (*found, spec.head.name)


def with_product(linear: Linear, path: str, product: Any, converts: Any) -> Linear:
    """Return a linear layer, and its adapter, with the product of those that are converted.

    Args:
        product: how converted layers multiply.
        converts: whether a layer is converted, given its path, `fan_in` and `fan_out`.
    """
    adapter, inner, outer = linear.adapter, linear.fan_in.value, linear.fan_out.value
    if isinstance(adapter, LoraAdapter):
        stem, path = f"{_PEFT}{path}", f"{_PEFT}{path}.base_layer"
        adapter = replace(
            adapter,
            down_product=product if converts(f"{stem}.lora_A.default", inner, adapter.r) else None,
            up_product=product if converts(f"{stem}.lora_B.default", adapter.r, outer) else None,
        )
    taken = converts(path, inner, outer) and not linear.transposed
    return replace(linear, adapter=adapter, product=product if taken else None)


def takes_over(counted: tuple[Module, int]) -> bool:
    """Whether a module, or its adapter, multiplies in its own way."""
    module, adapter = counted[0], getattr(counted[0], "adapter", None)
    products = (
        getattr(module, "product", None),
        getattr(adapter, "down_product", None),
        getattr(adapter, "up_product", None),
    )
    return any(products)
