"""Transformer Engine's linear layers, as Accelerate puts them in place."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import transformer_engine
from estimator.eager.ops import F32
from estimator.eager.size import Dim, dim
from estimator.eager.tensor import Param, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Linear, ModelSpec, Module, Norm, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.fp8 import Fp8, linear_paths, refuse_unknown, takes_over, with_product

MULTIPLE: Final = 16
TOKENS: Final = 8
"""What the kernels ask of the sizes of a weight, and of the tokens of a micro-batch.

Source: accelerate-te, convert_model; transformer-engine, utils.py, assert_dim_for_fp8_exec.
"""

WORKSPACE: Final = 32 * 1024 * 1024 + 1024
"""Bytes of the workspace of its products on Hopper.

Source: transformer-engine, cpp_extensions/gemm.py, get_cublas_workspace_size_bytes.
"""

_STATE: Final = Cite("transformer-engine", "quantization.py, DelayedScalingRecipeState")
_NOTES: Final = (
    "fp8 'te': read from Transformer Engine's source, and never run here; the layout is that of "
    "Ada and Hopper, which need transposed copies",
    "fp8 'te': its workspace of 32 MiB is Hopper's; cards before it take 4 MiB",
)
GRADIENTS: Final = {"HYBRID": DType.FLOAT8_E5M2, "E4M3": DType.FLOAT8_E4M3}


class TeProduct(Struct, frozen=True):
    """The product of a `te.Linear`.

    Args:
        history: steps that are remembered of the largest value of each factor.
    """

    gradient: DType
    history: int

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the scales and the largest values of factors and results.

        Shapes:
            forward: input, weight, output      scale [3], history [n, 3]  4 bytes
            backward: gradients of both ends    scale [2], history [n, 2]  4 bytes

        Source: transformer-engine, quantization.py, DelayedScalingRecipeState; module/base.py,
        TransformerEngineBaseModule.set_meta_tensor.
        """
        history = dim("n", self.history)
        return tuple(
            Weight(f"{way}.{name}", shape, F32, False, 0, _STATE)
            for way, count in (("scaling_fwd", 3), ("scaling_bwd", 2))
            for name, shape in (
                ("scale", (dim("q", count),)),
                ("amax_history", (history, dim("q", count))),
            )
        )

    def forward(
        self, run: Forward, weight: Param, bias: Param | None, x: Tensor, out: Dim
    ) -> Tensor:
        """Return `x W^T`."""
        return transformer_engine.linear(x, weight, out, self.gradient)


class TransformerEngine(Fp8, frozen=True, tag="te"):
    """te.Linear in place of linear layers, under DelayedScaling (Accelerate's TERecipeKwargs).

    Args:
        fp8_format: the 8-bit types: gradients in e5m2 (HYBRID), or all in e4m3.
        amax_history_len: steps that are remembered.
    """

    source: ClassVar[Cite] = Cite("transformer-engine", "module/linear.py, _Linear")

    fp8_format: Annotated[
        Literal["HYBRID", "E4M3"], Meta(description="te: 8-bit types; costs no memory.")
    ] = "HYBRID"
    amax_history_len: Annotated[
        int, Meta(ge=1, le=1_000_000, description="te: steps that scales are made of.")
    ] = 1024

    def apply(self, run: Run) -> Run:
        """Take over the linear layers that Accelerate converts, the head among them.

        Within one module it stops at the first layer whose sizes are no multiples of 16.

        Raises:
            UnsupportedCombinationError: a part that is not described.

        Source: accelerate-te, convert_model.
        """
        refuse_unknown(run, self.name)
        _refuse(run.spec)
        chosen = _converted(run.spec)
        product = TeProduct(GRADIENTS[self.fp8_format], self.amax_history_len)

        def convert(module: Module, path: str) -> Module:
            if not isinstance(module, Linear):
                return module
            return with_product(module, path, product, lambda *_: path in chosen)

        spec = run.spec.map_paths(convert, every_layer=True)
        if not any(map(takes_over, spec.module_counts())):
            raise UnsupportedCombinationError(
                f"fp8 'te' finds no nn.Linear to convert in this {spec.model_type} model; leave "
                "out fp8"
            )
        if spec.tied and spec.head.product is not None:
            raise UnsupportedCombinationError(
                "fp8 'te' would give the head a weight of its own, apart from the embeddings that "
                "it is tied to and unknown to the optimizer; use fp8 'torchao'"
            )
        workspace = Buffer("Transformer Engine's workspace", (dim("n", WORKSPACE),), DType.UINT8)
        buffers = (*spec.buffers, workspace)
        spec = replace(spec, buffers=buffers, notes=(*spec.notes, *_NOTES))
        return replace(run, spec=spec, token_multiple=TOKENS)


def _refuse(spec: ModelSpec) -> None:
    """Refuse what Accelerate converts in a way that is not described here."""
    for module, _ in spec.module_counts():
        if isinstance(module, Norm) and module.bias:
            raise UnsupportedCombinationError(
                f"fp8 'te' with the LayerNorm of {spec.model_type} models, which Accelerate "
                "converts too, has no sourced answer here yet; use fp8 'torchao'"
            )
        if isinstance(module, Linear) and module.bias:
            raise UnsupportedCombinationError(
                f"fp8 'te' with the bias of {module.name} has no sourced answer here yet, for the "
                "kernel that sums its gradient takes a workspace; use fp8 'torchao'"
            )
        if isinstance(module, Linear) and not module.trainable:
            raise UnsupportedCombinationError(
                "Accelerate gives every te.Linear a weight that wants a gradient, a frozen one "
                "too; with fp8 'te' use method full, or fp8 'torchao'"
            )


def _converted(spec: ModelSpec) -> frozenset[str]:
    """Return the paths of the layers that Accelerate converts."""
    sizes: dict[str, tuple[int, int]] = {}

    def see(module: Module, path: str) -> Module:
        if isinstance(module, Linear) and not module.transposed:
            sizes[path] = (module.fan_in.value, module.fan_out.value)
        return module

    spec.map_paths(see, every_layer=True)
    stopped: set[str] = set()
    found = []
    for path in linear_paths(spec):
        parent = path.rpartition(".")[0]
        if path not in sizes or any(size % MULTIPLE for size in sizes[path]):
            stopped.add(parent)
        elif parent not in stopped:
            found.append(path)
    return frozenset(found)
