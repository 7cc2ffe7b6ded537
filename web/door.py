"""One way from HTTP into the estimator, for the page and the API alike."""

from __future__ import annotations

from estimator.catalog import Access
from estimator.errors import EstimatorError, InvalidRequestError
from estimator.measurement import Measurement
from estimator.reconcile import Reconciliation
from estimator.request import EstimateRequest
from estimator.result import Result
from estimator.service import estimate, reconcile
from web.shield import Metrics


def answer(request: EstimateRequest, *, metrics: Metrics, door: str) -> Result:
    """Return the estimate of a request that came over HTTP.

    Only the catalogue is open to it: a client names neither files of this machine nor addresses,
    and does not look at this machine's GPU.

    Raises:
        EstimatorError: the request is refused.
    """
    try:
        _refuse_this_machine(request)
        result = estimate(request, access=Access.CATALOGUE)
    except EstimatorError as error:
        metrics.refusals.labels(door, error.slug).inc()
        raise
    metrics.verdicts.labels(door, result.verdict).inc()
    return result


def explain(asked: Measurement, *, metrics: Metrics, door: str) -> Reconciliation:
    """Return what would explain a measurement that came over HTTP, under the same limits.

    Raises:
        EstimatorError: the measurement or its request is refused.
    """
    try:
        if asked.request is not None:
            _refuse_this_machine(asked.request)
        return reconcile(asked, access=Access.CATALOGUE)
    except EstimatorError as error:
        metrics.refusals.labels(door, error.slug).inc()
        raise


def _refuse_this_machine(request: EstimateRequest) -> None:
    gpu = request.hardware.gpu
    if gpu is not None and gpu.strip().lower() == "auto":
        why = (
            "auto means the GPU of the machine that answers, which over HTTP is not yours; "
            "name a card of /v1/gpus, or give hardware.memory_bytes"
        )
        raise InvalidRequestError(f"hardware/gpu: {why}", (("/hardware/gpu", why),))
