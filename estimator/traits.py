"""What a request has in common with the runs that were measured, and where it differs."""

from __future__ import annotations

from estimator.calibration_file import Kind, Traits
from estimator.request import EstimateRequest


def traits(request: EstimateRequest, parameters: int) -> Traits:
    """Return the traits of a request.

    Args:
        parameters: of the whole model.
    """
    return Traits(kind_of(request), parameters, _choices(request))


def kind_of(request: EstimateRequest) -> Kind:
    """Return whether the base weights are trained, frozen, or frozen and packed."""
    if request.quantization is not None:
        return "quantized"
    return "full" if request.method.trains_base else "adapters"


def software_of(request: EstimateRequest) -> str:
    """Return the framework and its version."""
    return f"{request.software.framework} {request.software.version}"


def _choices(request: EstimateRequest) -> tuple[tuple[str, str], ...]:
    """Return every choice that decides about the tensors of a step, but for sizes."""
    optimizer = request.optimizer
    how = " in backward" if optimizer.in_backward else ""
    autocast = f" with autocast {request.autocast}" if request.autocast else ""
    return (
        ("method", request.method.name),
        ("quantization", request.quantization.name if request.quantization else "none"),
        ("precision", f"{request.precision}{autocast}"),
        ("optimizer", f"{optimizer.name}{how}"),
        ("checkpointing", request.activation_checkpointing),
        ("attention", request.attention),
        ("loss", request.loss),
        ("kernels", " and ".join(request.kernels) or "none"),
        ("fp8", request.fp8.name if request.fp8 else "none"),
        ("padding", "yes" if request.padding else "no"),
        ("software", software_of(request)),
    )
