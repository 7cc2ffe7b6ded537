"""LoRA on a parameter instead of a layer: the update is written out and added to the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import dim
from estimator.eager.tensor import Node, Param, Tensor
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Embedding, Linear, ModelSpec, Module, Norm, Weight
from estimator.section import Names
from estimator.sources import Cite

_DELTA: Final = Cite("peft", "tuners/lora/layer.py, ParamWrapper.get_delta_weight")
_MADE: Final = Cite("peft", "tuners/lora/layer.py, ParamWrapper.update_layer")
_SUM: Final = Cite("peft", "tuners/lora/layer.py, _LoraParameterProxy.forward")
_CHECK: Final = Cite("torch-parametrize", "ParametrizationList.__init__, consistency checks")


class ParameterAdapter(Struct, frozen=True):
    """A and B of one weight matrix."""

    r: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return A and B, fp32.

        Shapes:
            A  [r, columns of the weight]  4 bytes
            B  [rows of the weight, r]     4 bytes

        Source: peft, tuners/lora/layer.py, ParamWrapper._get_in_out_features and update_layer.
        """
        rank, (rows, columns) = dim("r", self.r), linear.weight().shape
        return (
            Weight("lora_A.weight", (rank, columns), DType.FLOAT32, True, source=_MADE),
            Weight("lora_B.weight", (rows, rank), DType.FLOAT32, True, source=_MADE),
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return the layer's product with `W + B A * scaling`, which is kept for backward.

        Shapes:
            BA, and BA scaled       [rows, columns]  4 bytes; 2 under autocast
            the same, cast          [rows, columns]  width of the weight, until the layer returns
            sum with the weight     [rows, columns]  width of the weight, twice: it is made once
                                                     for torch to look at its shape, and dropped
            in backward:
            gradient of the sum     [rows, columns]  width of the weight, then 4 bytes

        Source: peft, tuners/lora/layer.py, ParamWrapper._activate_lora; torch-parametrize,
        ParametrizationList.__init__ and cached.
        """
        down, up = (run.param(linear.name, each) for each in self.weights(linear))
        weight = linear.weight()
        delta = ops.cast(self._product(run, up, down), weight.dtype, "update in the weight's type")
        run.tape.new("sum, for its shape", weight.shape, weight.dtype, _CHECK)
        merged = run.tape.new("sum with the weight", weight.shape, weight.dtype, _SUM)
        run.tape.record("add", (delta,), (), lambda node, grads, saved: (grads[0],), merged)
        return run.base_linear(x, linear, merged)

    def _product(self, run: Forward, up: Param, down: Param) -> Tensor:
        """Return `B A * scaling`; the product saves both factors."""
        tape = run.tape
        left, right = (ops.autocast_weight(tape, each) for each in (up, down))
        out = Tensor(tape, (up.shape[0], down.shape[1]), left.dtype, None)

        def rule(node: Node, grads: list[Tensor], saved: list[Any]) -> tuple[Tensor, ...]:
            return node.new_grad(0), node.new_grad(1)

        tape.record("update", (left, right), (left, right), rule, out)
        tape.allocate(out, "update", _DELTA)
        return ops.scale(out, "scaled update")


def with_parameters(
    spec: ModelSpec, names: Names, rank: Callable[[str], int], *, every_layer: bool
) -> ModelSpec:
    """Put an adapter on each weight matrix whose path ends with a name.

    Args:
        rank: the rank at the path of a parameter.
        every_layer: the number of the layer can decide.

    Raises:
        InvalidRequestError: a name that matches nothing, or what has an adapter already.
        UnsupportedCombinationError: a table, or a head that is tied to one.

    Source: peft, tuners/tuners_utils.py, BaseTuner._inject_parameters; tuners/lora/layer.py,
    ParamWrapper.__init__, fan_in_fan_out.
    """
    found: set[str] = set()
    for module, _ in spec.module_counts():
        if isinstance(module, Linear) and module.transposed and module.adapter is not None:
            raise InvalidRequestError(
                f"PEFT does not adapt parameters beside {module.name}, which is a Conv1D; set "
                "target_modules []"
            )

    def adapt(module: Module, path: str) -> Module:
        named = [
            (name, weight)
            for weight in module.weights()
            for name in names
            if f".{path}.{weight.name}".endswith(f".{name}")
        ]
        if not named:
            return module
        found.update(name for name, _ in named)
        _refuse(spec, module, named[0][1])
        assert isinstance(module, Linear)
        return replace(module, adapter=ParameterAdapter(rank(f"{path}.weight")))

    out = spec.map_paths(adapt, every_layer=every_layer)
    missing = [name for name in names if name not in found]
    if missing:
        raise InvalidRequestError(
            f"target_parameters {missing} match no parameter of this {spec.model_type} model; name "
            "one with its module, such as 'mlp.down_proj.weight'"
        )
    return out


def _refuse(spec: ModelSpec, module: Module, weight: Weight) -> None:
    """Refuse what PEFT refuses, and what has no answer here."""
    if isinstance(module, Norm) or len(weight.shape) != 2:
        raise InvalidRequestError(
            f"target_parameters: {module.name}.{weight.name} is no matrix, and PEFT adapts only "
            "those (and stacks of experts)"
        )
    if isinstance(module, Linear) and module.adapter is not None:
        raise InvalidRequestError(
            f"{module.name} is among target_modules and target_parameters; leave it out of one, "
            "with target_modules [] for instance"
        )
    if isinstance(module, Embedding) or (module is spec.head and spec.tied):
        raise UnsupportedCombinationError(
            f"target_parameters on the table {module.name!r} has no sourced answer here yet; use "
            "trainable_token_indices, or modules_to_save"
        )
