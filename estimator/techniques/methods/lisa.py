"""LISA: embeddings, head, and a few decoder layers that take turns are trained."""

from typing import Annotated, ClassVar, Final

from msgspec import Meta
from msgspec.structs import replace

from estimator.errors import InvalidRequestError
from estimator.model.spec import LayerKind
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method, by_layer
from estimator.techniques.methods.partial import frozen_layer

NOTE: Final = (
    "LISA draws its layers anew every few steps; counted is the draw of the last layers, whose "
    "gradients are alive for the longest part of backward"
)
KEPT: Final = (
    "LISA's callback never takes a state away from the optimizer: counted are the states of all "
    "layers, which are there once every layer has had its turn; keep_states=false counts those of "
    "the layers of one draw"
)


class Lisa(Method, frozen=True, tag="lisa"):
    """Freeze the decoder layers but for a few that are drawn anew every few steps.

    What is outside of the layers is trained all the time, so that backward runs through all of
    them. The optimizer is built over everything, and keeps its states of layers that were trained
    before, unless a trainer builds it anew for each draw (`keep_states` false).

    Source: lmflow, pipeline/utils/lisa_trainer.py,
    DynamicLayerActivationCallback.switch_active_layers.
    """

    trains_base: ClassVar[bool] = True
    takes_turns: ClassVar[bool] = True
    optimizers: ClassVar[frozenset[str] | None] = frozenset(
        {"adamw", "adam", "sgd", "adafactor", "adamw_8bit", "paged_adamw_8bit"}
    )
    precisions: ClassVar[frozenset[str] | None] = frozenset(
        {"fp32", "bf16", "fp16", "amp_bf16", "amp_fp16"}
    )
    source: ClassVar[Cite] = Cite(
        "lmflow",
        "pipeline/utils/lisa_trainer.py, DynamicLayerActivationCallback.switch_active_layers",
    )

    activated_layers: Annotated[
        int, Meta(ge=1, le=100_000, description="Decoder layers that LISA trains at a time.")
    ] = 2
    keep_states: Annotated[
        bool, Meta(description="LISA's optimizer keeps the states of layers of earlier draws.")
    ] = True

    @property
    def singles_out_layers(self) -> bool:
        """Whether only the drawn layers are trained: always."""
        return True

    def apply(self, run: Run) -> Run:
        """Return the run with all layers frozen but the last ones.

        Raises:
            InvalidRequestError: more layers than the model has.
        """
        layers = len(run.spec.pattern)
        if self.activated_layers > layers:
            raise InvalidRequestError(
                f"activated_layers: the model has {layers} layers (given {self.activated_layers})"
            )

        def change(kind: LayerKind, chosen: bool) -> LayerKind:
            return kind if chosen else frozen_layer(kind)

        first = layers - self.activated_layers
        spec = by_layer(run.spec, lambda index: index >= first, change)
        notes = (NOTE, KEPT) if self.keep_states else (NOTE,)
        spec = replace(spec, notes=(*spec.notes, *notes))
        return replace(run, spec=spec, keeps_every_state=self.keep_states)
