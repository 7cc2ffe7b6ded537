"""What a campaign measures: three tables of cases, the most informative first.

`constants` asks the device for what no formula gives, `validation` runs requests that cover the
settings pairwise, `out-of-memory` runs requests with less memory than they may need.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, product, zip_longest
from typing import TYPE_CHECKING, Any, Final

from estimator.catalog.folder import load
from estimator.units import MiB
from profiler.levers import ANCHORS, LEVERS, anchor, libraries, request
from profiler.pairwise import ordered

if TYPE_CHECKING:
    from estimator.result import Range

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One fresh process: a request that is run, or a look at the device.

    Args:
        name: says in a few words what is run.
        why: what it tells that the cases before it do not.
        request: the request document; None for a probe.
        probe: one of `profiler.probes.PROBES`; None for a request.
        arguments: of the probe.
        limit_bytes: what the process may hold.
        libraries: packages that it needs beside torch and transformers.
    """

    name: str
    why: str
    request: Document | None = None
    probe: str | None = None
    arguments: Document = field(default_factory=dict)
    limit_bytes: int | None = None
    libraries: tuple[str, ...] = ()


Matrix = Callable[[str | None], Iterable[Case]]
"""Takes the catalogue's id of the GPU; the limits of `out-of-memory` depend on it."""


def cases(matrix: str, gpu: str | None = None) -> tuple[Case, ...]:
    """Return the cases of one matrix in their order, those that cannot run here last.

    Args:
        gpu: the catalogue's id of the device; None where the catalogue does not know it.
    """
    found = tuple(MATRICES[matrix](gpu))
    return tuple(sorted(found, key=lambda case: bool(missing(case))))


def missing(case: Case) -> tuple[str, ...]:
    """Return the packages that a case needs and this Python does not have."""
    return tuple(each for each in case.libraries if not installed(each))


@lru_cache(maxsize=64)
def installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


# --- constants --------------------------------------------------------------------------------

_TINY: Final[Document] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
_QLORA: Final[Document] = {
    "method": {"name": "lora", "r": 16, "lora_dropout": 0.0},
    "quantization": {"name": "nf4"},
    "autocast": "bf16",
}


def constants(_: str | None) -> Iterator[Case]:
    """Yield what the device alone knows: context, workspaces, transients of kernels, switches."""
    yield Case(
        "context", "device memory in use before the first tensor, and after a step", probe="context"
    )
    yield from _in_turns(_workspaces(), _transients(), _embeddings(), _packed_products(), _steps())


def _in_turns(*groups: Iterable[Case]) -> Iterator[Case]:
    """Yield the first of each group, then the second of each, and so on."""
    for cases_ in zip_longest(*groups):
        yield from (case for case in cases_ if case is not None)


def _workspaces() -> Iterator[Case]:
    for size in (256, 4096):
        yield Case(
            f"cuBLAS workspaces, products of {size}",
            "how many there are after forward, backward and a layer with a bias, and how large",
            probe="cublas_workspace",
            arguments={"size": size},
        )


def _steps() -> Iterator[Case]:
    """Whole steps of a small model: the context after a step, and what the phases need."""
    for name, changes in (
        ("plain", {}),
        ("checkpointed", {"activation_checkpointing": "full"}),
        ("amp", {"precision": "amp_bf16"}),
        ("fused AdamW", {"optimizer": "adamw_torch_fused"}),
        ("outputs kept", {"loop": {"keep_outputs": True}}),
        ("padded", {"padding": True}),
    ):
        yield Case(
            f"step, {name}",
            "the context after a step, and each phase of it, on four layers",
            request={
                "model": {"config": _TINY}, "micro_batch_size": 2, "seq_len": 1024,
                "optimizer": "adamw_torch", **changes,
            },
        )  # fmt: skip


# Micro-batch, length, heads of queries and of keys, and their width.
_SHAPES: Final = (
    (1, 2048, 32, 8, 128), (4, 1024, 16, 16, 64), (1, 8192, 32, 8, 128), (2, 1000, 12, 4, 96),
    (1, 4096, 8, 1, 256), (1, 4096, 32, 32, 128),
)  # fmt: skip
_KERNELS: Final = ("flash", "cudnn", "efficient", "math")


def _transients() -> Iterator[Case]:
    for shape, kernel in product(_SHAPES, _KERNELS):
        b, s, heads, key_heads, width = shape
        if (kernel == "math" and s > 2048) or (kernel == "efficient" and heads != key_heads):
            # Scores of long sequences, and heads of keys that other heads share.
            continue
        yield Case(
            f"attention, {kernel}, {b} x {s}, {heads}/{key_heads} heads of {width}",
            "what the kernel allocates for itself, forward and backward",
            probe="attention_backward",
            arguments={
                "backend": kernel, "batch": b, "seq_len": s, "heads": heads,
                "kv_heads": key_heads, "head_dim": width, "dtype": "bfloat16",
            },
        )  # fmt: skip


def _embeddings() -> Iterator[Case]:
    for (vocab, hidden), tokens in product(((32000, 2048), (151936, 1024)), (3072, 3073, 8192)):
        yield Case(
            f"embedding backward, {tokens} tokens, {vocab} x {hidden}",
            "above 3072 tokens another kernel runs, which sorts",
            probe="embedding_backward",
            arguments={
                "tokens": tokens, "vocab_size": vocab, "hidden_size": hidden, "dtype": "bfloat16",
            },
        )  # fmt: skip


def _packed_products() -> Iterator[Case]:
    tokens = (1536, 1537)
    for each in tokens:
        yield Case(
            f"4-bit product, {each} tokens",
            "above 1536 tokens bitsandbytes makes the whole weight first",
            probe="bnb_4bit_threshold",
            arguments={"tokens": each, "in_features": 4096, "out_features": 14336},
            libraries=("bitsandbytes",),
        )
    for each in tokens:
        yield Case(
            f"QLoRA step, {each} tokens",
            "above 1536 tokens bitsandbytes makes the whole weight first; in a whole step",
            request={"model": {"config": _TINY}, "seq_len": each, **_QLORA},
            libraries=("bitsandbytes", "peft"),
        )


# --- validation -------------------------------------------------------------------------------

ROWS: Final = "campaigns/validation.json"
"""Rows that cover every pair of settings; `profiler.make_matrix` writes them."""


def validation(_: str | None) -> Iterator[Case]:
    """Yield what people run, then rows that cover the settings pairwise.

    Rows whose libraries are not installed come behind the others, which cover all pairs among
    themselves: a machine without bitsandbytes spends its time on what it can run.
    """
    anchors = list(map(anchor, ANCHORS.values()))
    for name, values in zip(ANCHORS, anchors, strict=True):
        yield _run(values, f"anchor: {name}")
    rows = [values for values in validation_rows() if values not in anchors]
    here = [values for values in rows if all(map(installed, libraries(values)))]
    elsewhere = [values for values in rows if values not in here]
    levers = {lever: list(settings) for lever, settings in LEVERS.items()}
    for row in chain(ordered(levers, anchors, here), ordered(levers, [*anchors, *here], elsewhere)):
        if row.new_pairs:
            yield _run(row.values, f"{row.new_pairs} pairs of settings that no case before it has")


def _runs_here(values: Mapping[str, str]) -> bool:
    return all(map(installed, libraries(values)))


def validation_rows() -> list[dict[str, str]]:
    """Return the rows of the file, in its order."""
    names, *rows = load(ROWS)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _run(values: Mapping[str, str], why: str) -> Case:
    unusual = [
        f"{_SAID[lever]}{name}"
        for lever, name in values.items()
        if lever == "model" or name != next(iter(LEVERS[lever]))
    ]
    return Case(" · ".join(unusual), why, request=request(values), libraries=libraries(values))


# Put before values that do not say what they are of.
_SAID: Final = dict.fromkeys(LEVERS, "") | {"checkpointing": "checkpointing "}


# --- out-of-memory ----------------------------------------------------------------------------

# Which end of what we say is needed, and what part of it the process gets. A run that fails with
# all of the high end is a false `fits`, one that runs with less than the low end a false
# `does not fit`: these two come first.
_LIMITS: Final = (
    ("high", 1.00), ("low", 0.97), ("expected", 1.00), ("low", 1.00), ("high", 0.97),
    ("expected", 0.97), ("low", 0.90), ("high", 0.90), ("expected", 0.90),
)  # fmt: skip

_NEAR_THE_EDGE: Final[tuple[Mapping[str, str], ...]] = (
    {"model": "tinyllama-1.1b", "optimizer": "adamw foreach", "shape": "2x1024"},
    {"model": "llama-3.1-8b", "method": "lora", "checkpointing": "full", "shape": "1x4096"},
    {"model": "qwen2.5-0.5b", "precision": "amp_bf16", "shape": "4x1024"},
    {"model": "llama-3.2-1b", "checkpointing": "full", "shape": "8x512"},
    {"model": "gemma-3-1b", "method": "lora dropout", "checkpointing": "full", "shape": "2x1024"},
    {"model": "mistral-7b", "method": "qlora", "precision": "autocast", "checkpointing": "full"},
    {"model": "pythia-1b", "optimizer": "sgd", "shape": "3x1000"},
    {"model": "gpt2-medium", "attention": "eager", "shape": "8x512"},
    {"model": "qwen3-0.6b", "batch": "padding", "shape": "3x1000"},
    {"model": "tinyllama-1.1b", "precision": "fp32", "loop": "accumulation", "shape": "1x512"},
    {"model": "opt-1.3b", "optimizer": "adafactor", "shape": "2x1024"},
    {"model": "tinyllama-1.1b", "optimizer": "adamw 8-bit", "loop": "outputs kept"},
)


def out_of_memory(gpu: str | None) -> Iterator[Case]:
    """Yield requests with as much memory as we say they need, and with a little less."""
    requests = [_run(anchor(settings), "") for settings in _NEAR_THE_EDGE]
    needs = [needed_by_tensors(case.request or {}, gpu) for case in requests]
    for end, part in _LIMITS:
        for case, need in zip(requests, needs, strict=True):
            limit = round(need[end] * part) // (2 * MiB) * 2 * MiB
            yield Case(
                f"{case.name}, {part:.2f} of {end}",
                f"whether it runs with {part:.2f} of the {end} end of what we say it needs",
                request=case.request,
                limit_bytes=limit,
                libraries=case.libraries,
            )


def needed(document: Document, gpu: str | None) -> dict[str, int]:
    """Return what the analytic engine says that a request needs: low, expected, high [bytes]."""
    found, _ = _answer(document, gpu)
    return {"low": found.low, "expected": found.expected, "high": found.high}


def needed_by_tensors(document: Document, gpu: str | None) -> dict[str, int]:
    """Return the same without the CUDA context, which torch does not count as the process's."""
    found, context = _answer(document, gpu)
    return {
        "low": found.low - context.low,
        "expected": found.expected - context.expected,
        "high": found.high - context.high,
    }


def _answer(document: Document, gpu: str | None) -> tuple[Range, Range]:
    # Only this matrix asks the engine; the others start without it.
    from estimator import pipeline, service
    from estimator.catalog import Access
    from estimator.request import parse_request

    asked = parse_request({**document, **({"hardware": {"gpu": gpu}} if gpu else {})})
    model = service.model_config(asked, Access.LOCAL)
    engine = pipeline.engine_for(asked, model.config, model.id)
    device = pipeline.device_of(service.requested_gpu(asked), asked)
    found = engine.needed(asked.micro_batch_size, asked.seq_len, device)
    return found, device.constants.context


MATRICES: Final[dict[str, Matrix]] = {
    "constants": constants,
    "validation": validation,
    "out-of-memory": out_of_memory,
}


def canonical(case: Case) -> str:
    """Return what a case asks for as text that does not depend on the order of fields."""
    asked = {
        "request": case.request,
        "probe": case.probe,
        "arguments": dict(case.arguments),
        "limit_bytes": case.limit_bytes,
    }
    return json.dumps(asked, sort_keys=True, separators=(",", ":"))
