"""The optimizer section of the request: which one, how it is implemented, and its knobs."""

from typing import Annotated, Literal

from msgspec import Meta

from estimator.section import Section

Momentum = Annotated[float, Meta(ge=0, lt=1)]


class Optimizer(Section, frozen=True):
    """The optimizer; it and its knobs are spelled as their library spells them.

    A knob belongs to the optimizers whose row names it (`estimator/techniques/optimizers`).
    """

    name: str = "adamw"
    implementation: Literal["foreach", "fused", "single"] | None = None
    momentum: Momentum = 0.0
    in_backward: bool = False
    amsgrad: Annotated[bool, Meta(description="Adam keeps the maximum of the second moment.")] = (
        False
    )
    nesterov: Annotated[bool, Meta(description="Nesterov momentum of SGD.")] = False
    centered: Annotated[bool, Meta(description="RMSprop keeps the mean gradient as well.")] = False
    beta1: Annotated[
        float | None, Meta(description="First moment of Adafactor; none: it keeps no momentum.")
    ] = None
    rank: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Rank of GaLore's and APOLLO's projections.")
    ] = 128
    scale_type: Annotated[
        Literal["channel", "tensor"] | None,
        Meta(description="What APOLLO scales by one factor; none: each channel."),
    ] = None
    max_precondition_dim: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="Largest dimension that SOAP preconditions."),
    ] = 10_000
    bf16_stochastic_round: Annotated[
        bool, Meta(description="torchao rounds updated bf16 weights at random.")
    ] = False
    offload_gradients: Annotated[
        bool, Meta(description="torchao drops a gradient once it is copied to the host.")
    ] = False
    minimal_size: Annotated[
        int, Meta(ge=0, le=2**40, description="Smaller tensors torchao updates on the GPU.")
    ] = 4096
