"""Houlsby adapters: one bottleneck behind attention and one behind the feed-forward network."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from estimator.sources import Cite
from estimator.techniques.bottleneck import BottleneckMethod


class HoulsbyAdapter(BottleneckMethod, frozen=True, tag="houlsby_adapter"):
    """Train two bottleneck adapters in each layer (DoubleSeqBnConfig of the adapters library)."""

    source: ClassVar[Cite] = Cite("houlsby2019", "section 2.1, figure 2")
    sites: ClassVar[tuple[str, ...]] = ("attention_adapters", "output_adapters")
    sums_first: ClassVar[bool] = False

    non_linearity: Annotated[
        Literal["relu", "swish", "silu", "gelu", "gelu_new"],
        Meta(description="Activation inside the bottleneck."),
    ] = "swish"

    @property
    def activation(self) -> str:
        """The activation inside the bottleneck."""
        return self.non_linearity
