"""Pfeiffer adapters: one bottleneck behind the feed-forward network, over the residual sum."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from estimator.sources import Cite
from estimator.techniques.bottleneck import BottleneckMethod


class PfeifferAdapter(BottleneckMethod, frozen=True, tag="pfeiffer_adapter"):
    """Train one bottleneck adapter in each layer (SeqBnConfig of the adapters library)."""

    source: ClassVar[Cite] = Cite("adapters", "configuration/adapter_config.py, SeqBnConfig")
    sites: ClassVar[tuple[str, ...]] = ("output_adapters",)
    sums_first: ClassVar[bool] = True

    non_linearity: Annotated[
        Literal["relu", "swish", "silu", "gelu", "gelu_new"],
        Meta(description="Activation inside the bottleneck."),
    ] = "relu"

    @property
    def activation(self) -> str:
        """The activation inside the bottleneck."""
        return self.non_linearity
