"""What may differ between a request and the run that was measured: changes of the document.

Each is a recipe that people run while they believe to run another one. How plausible a change is,
is our judgement; it only breaks ties between changes that explain alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

from msgspec import Struct

from estimator.request import EstimateRequest, convert_request
from estimator.techniques.methods.lora import Lora
from estimator.techniques.methods.partial import Partial
from estimator.techniques.quantizations.four_bit import FourBitQuantization
from estimator.techniques.software import PROFILES

Plausibility = Literal["often", "sometimes", "seldom"]


class Change(Struct, frozen=True):
    """One way in which the run may differ.

    Args:
        name: names the term; unique among the changes of a request.
        summary: what the run would do, as the end of a sentence that begins with "if".
        fields: JSON pointers of the request with their new values.
        fitted: a number was chosen so that it explains: it fits anything, and proves little.
    """

    name: str
    summary: str
    fields: dict[str, Any]
    plausibility: Plausibility
    fitted: bool = False


def changed(request: EstimateRequest, fields: dict[str, Any]) -> EstimateRequest:
    """Return the request with some fields set.

    Raises:
        EstimatorError: the document is refused.
    """
    document = request.to_dict()
    for pointer, value in fields.items():
        *sections, field = pointer.strip("/").split("/")
        inner = document
        for section in sections:
            inner = inner[section]
        inner[field] = value
    return convert_request(document)


def document_of(request: EstimateRequest, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields as a part of a request document, sections whole.

    Example:
        >>> request = convert_request({"model": "gpt2"})
        >>> document_of(request, {"/loop/keep_outputs": True})["loop"]["keep_outputs"]
        True
    """
    whole = changed(request, fields).to_dict()
    return {section: whole[section] for section in _sections(fields)}


def _sections(fields: dict[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(pointer.split("/")[1] for pointer in fields))


def conflict(one: Change, other: Change) -> bool:
    """Whether two changes set the same field, or one a section of the other."""
    return any(
        f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")
        for a in one.fields
        for b in other.fields
    )


def changes(request: EstimateRequest) -> Iterator[Change]:
    """Yield what may differ from a request, the plausible first within a topic."""
    for topic in _TOPICS:
        yield from topic(request)


def _loop(request: EstimateRequest) -> Iterator[Change]:
    loop = request.loop
    if loop.keep_outputs:
        yield Change(
            "outputs dropped", "the outputs are dropped before backward",
            {"/loop/keep_outputs": False}, "often",
        )  # fmt: skip
    else:
        yield Change(
            "outputs kept", "the loop keeps the outputs, logits included, through backward",
            {"/loop/keep_outputs": True}, "often",
        )  # fmt: skip
    if not loop.use_cache:
        yield Change(
            "KV cache", "the outputs hold a KV cache too and are kept through backward",
            {"/loop/use_cache": True, "/loop/keep_outputs": True}, "sometimes",
        )  # fmt: skip
    if request.gradient_accumulation_steps == 1:
        yield Change(
            "gradient accumulation", "gradients are accumulated, so that they outlive a backward",
            {"/gradient_accumulation_steps": 2}, "often",
        )  # fmt: skip
    else:
        yield Change(
            "no gradient accumulation", "no gradients are there when a forward begins",
            {"/gradient_accumulation_steps": 1}, "often",
        )  # fmt: skip


def _batch(request: EstimateRequest) -> Iterator[Change]:
    padding = not request.padding
    if not request.packing:
        yield Change(
            "padding" if padding else "no padding",
            "batches hold padding, so that a mask is passed"
            if padding
            else "no batch holds padding, so that no mask is passed",
            {"/padding": padding},
            "often",
        )
    b, s = request.micro_batch_size, request.seq_len
    whole = b * request.gradient_accumulation_steps
    for size in dict.fromkeys((whole, 2 * b, b // 2)):
        if size not in (0, b):
            yield Change(
                f"micro-batch {size}", f"the micro-batch is {size}",
                {"/micro_batch_size": size}, "sometimes",
            )  # fmt: skip
    for length in (2 * s, s // 2):
        if length:
            yield Change(
                f"length {length}", f"the longest batch has {length} tokens",
                {"/seq_len": length}, "sometimes",
            )  # fmt: skip


def _recomputation(request: EstimateRequest) -> Iterator[Change]:
    if request.activation_checkpointing == "none":
        yield Change(
            "checkpointing", "activation checkpointing is on",
            {"/activation_checkpointing": "full"}, "often",
        )  # fmt: skip
    else:
        yield Change(
            "no checkpointing", "activation checkpointing does not take effect",
            {"/activation_checkpointing": "none"}, "often",
        )  # fmt: skip


_ATTENTION: Final[dict[str, tuple[str, Plausibility]]] = {
    "sdpa": ("attention is sdpa", "often"),
    "sdpa_math": ("sdpa takes its unfused kernel", "sometimes"),
    "eager": ("attention is eager", "sometimes"),
    "flash_attention_2": ("attention is FlashAttention 2", "sometimes"),
}


def _attention(request: EstimateRequest) -> Iterator[Change]:
    for word, (summary, plausibility) in _ATTENTION.items():
        if word != request.attention:
            yield Change(f"attention {word}", summary, {"/attention": word}, plausibility)


def _precision(request: EstimateRequest) -> Iterator[Change]:
    if request.autocast is not None:
        yield Change("no autocast", "autocast is off", {"/autocast": None}, "often")
    elif not request.precision.startswith("amp"):
        yield Change("autocast", "autocast to bf16 is on", {"/autocast": "bf16"}, "often")
    if request.precision in ("bf16", "fp16"):
        yield Change("fp32 weights", "the weights are fp32", {"/precision": "fp32"}, "sometimes")
        yield Change(
            "fp32 weights, autocast", "the weights are fp32, under autocast to bf16",
            {"/precision": "fp32", "/autocast": "bf16"}, "often",
        )  # fmt: skip
    else:
        yield Change(
            "bf16 weights", "the weights are bf16",
            {"/precision": "bf16", "/autocast": None}, "often",
        )  # fmt: skip


def _optimizer(request: EstimateRequest) -> Iterator[Change]:
    optimizer = request.optimizer
    if optimizer.name in ("adam", "adamw"):
        for word in ("foreach", "fused", "single"):
            if word != optimizer.implementation:
                yield Change(
                    f"{optimizer.name} {word}", f"the step of {optimizer.name} is {word}",
                    {"/optimizer/implementation": word},
                    "sometimes" if word == "single" else "often",
                )  # fmt: skip
        other = {"name": "adamw_8bit"}
        yield Change(
            "8-bit optimizer", "the optimizer is adamw_8bit", {"/optimizer": other}, "sometimes"
        )
    else:
        plain = {"name": "adamw"}
        yield Change(
            "plain AdamW", "the optimizer is torch's AdamW", {"/optimizer": plain}, "sometimes"
        )


def _software(request: EstimateRequest) -> Iterator[Change]:
    framework = request.software.framework
    for version in PROFILES[framework]:
        if version != request.software.version:
            yield Change(
                f"{framework} {version}", f"the loss is that of {framework} {version}",
                {"/software/version": version}, "often",
            )  # fmt: skip


def _loss(request: EstimateRequest) -> Iterator[Change]:
    if request.loss == "standard":
        yield Change(
            "chunked loss", "the loss is computed in chunks, as TRL does",
            {"/loss": "chunked"}, "sometimes",
        )  # fmt: skip
        yield Change(
            "fused loss", "the loss is fused with the head, as Liger's",
            {"/loss": "fused_linear"}, "sometimes",
        )  # fmt: skip
    else:
        yield Change(
            "whole logits",
            "the loss makes the logits of all tokens",
            {"/loss": "standard"},
            "often",
        )
    if request.kernels:
        yield Change("plain kernels", "no kernel is replaced", {"/kernels": []}, "sometimes")


def _quantization(request: EstimateRequest) -> Iterator[Change]:
    asked = request.quantization
    if asked is None:
        return
    yield Change(
        "weights not quantized", "the weights are not quantized", {"/quantization": None},
        "sometimes",
    )  # fmt: skip
    if asked.upcasts:
        what = "does not prepare" if asked.prepare_kbit else "prepares"
        yield Change(
            "no k-bit preparation" if asked.prepare_kbit else "k-bit preparation",
            f"PEFT {what} the model for k-bit training",
            {"/quantization/prepare_kbit": not asked.prepare_kbit}, "often",
        )  # fmt: skip
    if isinstance(asked, FourBitQuantization):
        yield Change(
            "no double quantization" if asked.double_quant else "double quantization",
            f"the scales are {'not ' if asked.double_quant else ''}quantized too",
            {"/quantization/double_quant": not asked.double_quant}, "often",
        )  # fmt: skip
        if asked.compute_dtype != "float32":
            yield Change(
                "fp32 products", "4-bit weights multiply in fp32, which is bitsandbytes' default",
                {"/quantization/compute_dtype": "float32"}, "sometimes",
            )  # fmt: skip


def _adapters(request: EstimateRequest) -> Iterator[Change]:
    dtype = request.method.to_dict().get("adapter_dtype")
    if dtype is not None:
        word = "base" if dtype == "float32" else "float32"
        what = "of the weights' type" if word == "base" else "fp32"
        yield Change(
            f"adapters {word}", f"the adapters are {what}", {"/method/adapter_dtype": word}, "often"
        )
    if not isinstance(request.method, Lora):
        return
    targets, dropout = request.method.target_modules, request.method.lora_dropout
    if targets != "all-linear":
        yield Change(
            "adapters on all", "the adapters are on all linear layers",
            {"/method/target_modules": "all-linear"}, "sometimes",
        )  # fmt: skip
    if tuple(targets) != _NARROW:
        yield Change(
            "adapters on q and v", "the adapters are on q_proj and v_proj only",
            {"/method/target_modules": list(_NARROW)}, "sometimes",
        )  # fmt: skip
    yield Change(
        "no dropout" if dropout else "dropout",
        f"there is {'no ' if dropout else ''}dropout before the adapters",
        {"/method/lora_dropout": 0.0 if dropout else 0.05}, "often",
    )  # fmt: skip


def _others(request: EstimateRequest) -> Iterator[Change]:
    method = request.method
    if isinstance(method, Partial):
        freeze = not method.freeze_others
        yield Change(
            "others frozen" if freeze else "others not frozen",
            "what the optimizer does not have is frozen"
            if freeze
            else "what the optimizer does not have is not frozen, and keeps its gradients",
            {"/method/freeze_others": freeze},
            "often",
        )


_NARROW: Final = ("q_proj", "v_proj")

_TOPICS: Final[tuple[Callable[[EstimateRequest], Iterator[Change]], ...]] = (
    _loop, _batch, _recomputation, _attention, _precision, _optimizer, _software, _loss,
    _quantization, _adapters, _others,
)  # fmt: skip
