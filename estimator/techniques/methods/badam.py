"""BAdam: one decoder layer at a time is trained, through an fp32 copy."""

from typing import ClassVar, Final

from msgspec.structs import replace

from estimator.errors import UnsupportedCombinationError
from estimator.model.spec import LayerKind, Module
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method, by_layer
from estimator.techniques.methods.partial import frozen_layer

NOTE: Final = (
    "BAdam trains one decoder layer after the other; counted is the turn of the first, through "
    "which backward is longest"
)


class Badam(Method, frozen=True, tag="badam"):
    """Freeze everything but one decoder layer, and update an fp32 copy of it.

    Copies, states and gradients of a layer are dropped when the next one has its turn. Embeddings
    and head are never trained, as LLaMA-Factory calls it (`use_badam`, layer mode).

    Source: badam, block_optim.py, BlockOptimizer; llamafactory, train/trainer_utils.py,
    _create_badam_optimizer.
    """

    trains_base: ClassVar[bool] = True
    takes_turns: ClassVar[bool] = True
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw", "adam", "sgd"})
    precisions: ClassVar[frozenset[str] | None] = frozenset({"bf16", "fp16"})
    source: ClassVar[Cite] = Cite("badam", "block_optim.py, BlockOptimizer")

    @property
    def singles_out_layers(self) -> bool:
        """Whether only one layer is trained: always."""
        return True

    def apply(self, run: Run) -> Run:
        """Return the run with all frozen but the first layer, which the optimizer copies.

        Raises:
            UnsupportedCombinationError: BAdam finds no blocks in a model of this family.
        """
        spec = run.spec
        if not spec.layers_path.endswith("layers"):
            raise UnsupportedCombinationError(
                f"BAdam looks for its blocks under 'layers', and a {spec.model_type} model has "
                f"them under {spec.layers_path!r}; use method 'lisa' or 'partial'"
            )

        def frozen(module: Module) -> Module:
            return replace(module, trainable=False, trainable_bias=False)

        def change(kind: LayerKind, chosen: bool) -> LayerKind:
            return kind if chosen else frozen_layer(kind)

        outside = replace(
            spec,
            embeddings=tuple(frozen(each) for each in spec.embeddings),
            final=tuple(frozen(each) for each in spec.final),
            head=frozen(spec.head),
        )
        changed = by_layer(outside, lambda index: index == 0, change)
        return replace(
            run,
            spec=replace(changed, notes=(*spec.notes, NOTE)),
            optimizer=replace(run.optimizer, of_blocks=True),
        )
