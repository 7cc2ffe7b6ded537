"""The way in: one function for the CLI, the page, the API and Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from estimator.catalog import Access, Gpu, ModelConfig, find_gpu, find_model
from estimator.errors import UnknownGpuError
from estimator.measurement import Measurement, parse_measurement, reading_of
from estimator.oom_message import parse_message
from estimator.out_of_memory import diagnose, on_the_card
from estimator.pipeline import answer
from estimator.planner import Question, limits, suggestions
from estimator.reconcile import Reconciliation, explain, unasked
from estimator.request import EstimateRequest, InlineModel, parse_request
from estimator.result import Result
from estimator.verdict import sentence
from estimator.waterfall import waterfall


def estimate(
    request: EstimateRequest | str | bytes | Mapping[str, Any],
    *,
    access: Access = Access.LOCAL,
) -> Result:
    """Answer one request with the analytic engine.

    Args:
        request: a parsed request, or the document as JSON text or a dictionary.
        access: where a model's name may be looked up: the catalogue only, also this machine's
            disk, or also the Hub.

    Raises:
        EstimatorError: one of its subclasses says what is wrong and what to do.

    Example:
        >>> estimate({"model": "meta-llama/Llama-3.1-8B"}).parameters.total
        8030261248
    """
    if not isinstance(request, EstimateRequest):
        request = parse_request(request if isinstance(request, (str, bytes)) else dict(request))
    model = model_config(request, access)
    question = Question(request, model.config, model.id, requested_gpu(request))
    result = answer(request, model.config, model.id, question.gpu)
    found = suggestions(question)
    return replace(
        result,
        limits=limits(question),
        suggestions=found,
        waterfall=waterfall(question) if request.waterfall else (),
        message=sentence(result.verdict, result.peak, result.capacity, found, request.confidence),
    )


def reconcile(
    asked: Measurement | str | bytes | Mapping[str, Any],
    *,
    access: Access = Access.LOCAL,
) -> Reconciliation:
    """Say what would explain a measurement, or an out-of-memory message.

    Args:
        asked: the request with what was measured; a parsed document, JSON text or a dictionary.
        access: where a model's name may be looked up.

    Raises:
        EstimatorError: one of its subclasses says what is wrong and what to do.

    Example:
        >>> asked = {"request": {"model": "gpt2", "seq_len": 512}, "measured": "2.45GiB"}
        >>> reconcile(asked).gap_bytes is None
        False
    """
    if not isinstance(asked, Measurement):
        asked = parse_measurement(asked if isinstance(asked, (str, bytes)) else dict(asked))
    message = None if asked.message is None else parse_message(asked.message)
    reading = reading_of(asked, message)
    if asked.request is None:
        assert message is not None, "reading_of refuses neither a number nor a message"
        return unasked(diagnose(message, None))
    request = on_the_card(asked.request, message)
    model = model_config(request, access)
    question = Question(request, model.config, model.id, requested_gpu(request))
    base = answer(request, model.config, model.id, question.gpu)
    diagnosis = None
    if message is not None:
        diagnosis = diagnose(message, question, suggestions(question))
    return explain(question, base, reading, diagnosis)


def model_config(request: EstimateRequest, access: Access) -> ModelConfig:
    """Return the configuration of a request's model, from the request itself or by name."""
    if isinstance(request.model, InlineModel):
        name = str(request.model.config.get("_name_or_path") or "inline configuration")
        return ModelConfig(id=name, config=request.model.config, origin="the request")
    return find_model(request.model, access)


def requested_gpu(request: EstimateRequest) -> Gpu | None:
    """Return the catalogue's row of the requested GPU.

    With `memory_bytes` given, a name that the catalogue lacks is only a label.

    Raises:
        UnknownGpuError: the GPU is not in the catalogue and no memory size is given.
    """
    name = request.hardware.gpu
    if name is None:
        return None
    try:
        return find_gpu(name)
    except UnknownGpuError:
        if request.hardware.memory_bytes is None:
            raise
        return None
