"""torchao's float8 training, as Accelerate and torchtitan put it in place."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import float8
from estimator.eager.float8 import MULTIPLE, Recipe
from estimator.eager.size import Dim
from estimator.eager.tensor import Param, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Linear, Module, Weight
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.fp8 import (
    Fp8,
    linear_paths,
    refuse_unknown,
    takes_over,
    with_product,
)

RECIPES: Final[dict[str, Recipe]] = {
    "tensorwise": Recipe(False, False, DType.FLOAT8_E5M2),
    "rowwise": Recipe(True, False, DType.FLOAT8_E4M3),
    "rowwise_with_gw_hp": Recipe(True, True, DType.FLOAT8_E4M3),
}
"""Source: torchao, float8/config.py, Float8LinearConfig.from_recipe_name."""

_EAGER: Final = (
    "fp8: eager torch casts through fp32, with 9 bytes for each element of one factor at a time; "
    "torchao is meant for torch.compile, which fuses these casts and needs less"
)
_KERNEL: Final = "fp8: the workspace of the CUTLASS kernel for row-wise scales is not counted"


class Float8Product(Struct, frozen=True):
    """The product of a `Float8Linear`."""

    recipe: Recipe

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return nothing: scales are made anew for each product."""
        return ()

    def forward(
        self, run: Forward, weight: Param, bias: Param | None, x: Tensor, out: Dim
    ) -> Tensor:
        """Return `x W^T + b`."""
        return float8.linear(x, weight, bias, out, self.recipe)


class Torchao(Fp8, frozen=True, tag="torchao"):
    """Float8Linear in place of linear layers (torchao's convert_to_float8_training).

    Args:
        recipe: what has a scale of its own.
        pad_inner_dim: products are padded to multiples of 16, as Accelerate asks for.
        filter_fqns: layers whose path holds one of these parts keep their product, as torchtitan
            has it; None: the first and the last linear layer, as Accelerate has it.
    """

    source: ClassVar[Cite] = Cite("torchao", "float8/float8_linear.py, Float8Linear")

    recipe: Annotated[
        Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"],
        Meta(description="torchao: what has a scale of its own."),
    ] = "tensorwise"
    pad_inner_dim: Annotated[
        bool, Meta(description="torchao: pad products to multiples of 16, as Accelerate does.")
    ] = True
    filter_fqns: Annotated[
        Names | None,
        Meta(description="Parts of the paths of layers left out; none: first and last layer."),
    ] = None

    def apply(self, run: Run) -> Run:
        """Take over every linear layer whose sizes are multiples of 16 and that is not left out.

        Raises:
            UnsupportedCombinationError: no layer is left, or a part that is not described.

        Source: accelerate-ao, filter_linear_layers and find_first_last_linear_layers;
        torchtitan-quantization, utils.py, module_filter_fn.
        """
        refuse_unknown(run, self.name)
        spec = run.spec
        first, *_, last = linear_paths(spec)
        product = Float8Product(replace(RECIPES[self.recipe], pads=self.pad_inner_dim))

        def converts(path: str, fan_in: int, fan_out: int) -> bool:
            if fan_in % MULTIPLE or fan_out % MULTIPLE:
                return False
            if self.filter_fqns is None:
                plain = path.removeprefix("base_model.model.").removesuffix(".base_layer")
                return plain not in (first, last)
            return not any(name in path for name in self.filter_fqns)

        def convert(module: Module, path: str) -> Module:
            if isinstance(module, Linear):
                return with_product(module, path, product, converts)
            return module

        spec = spec.map_paths(convert, every_layer=True)
        conv1d = any(
            isinstance(each, Linear) and each.transposed for each, _ in spec.module_counts()
        )
        if conv1d or not any(map(takes_over, spec.module_counts())):
            raise UnsupportedCombinationError(
                f"fp8 'torchao' finds no nn.Linear to convert in this {spec.model_type} model: it "
                "takes layers whose sizes are multiples of 16, none that is left out, and no "
                "Conv1D; leave out fp8"
            )
        notes = (_EAGER,) if self.recipe == "tensorwise" else (_EAGER, _KERNEL)
        needs = not self.pad_inner_dim and self.recipe != "rowwise_with_gw_hp"
        return replace(
            run,
            spec=replace(spec, notes=(*spec.notes, *notes)),
            pads_tokens=self.pad_inner_dim,
            token_multiple=MULTIPLE if needs else 1,
        )
