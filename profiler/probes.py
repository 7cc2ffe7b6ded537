"""Looks at the device itself: constants of the process, and what single kernels take.

Each probe runs in a process of its own, as a request does: much of what it looks at happens once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from estimator.errors import EstimatorError, InvalidRequestError, MissingDependencyError
from estimator.record import Outcome, Probe
from estimator.request import parse_request
from estimator.units import round_up
from profiler.bench import Bench
from profiler.device import Device, Simulated
from profiler.gauge import Gauge
from profiler.measurement import Options, hold_lock, measure, now, one_line

Arguments = dict[str, Any]
Values = dict[str, int]

_BLOCK: Final = 512


@dataclass(frozen=True, slots=True)
class Look:
    """One probe.

    Args:
        what: is looked at, for people.
        defaults: of its arguments; their types are those that are taken.
        values: does the work and returns what was found, by name [bytes].
    """

    what: str
    defaults: Arguments
    values: Callable[[Bench, Arguments], Values]


def _cublas_workspace(bench: Bench, asked: Arguments) -> Values:
    """Return what stays allocated after the first products, beside their results.

    One workspace for each handle of cuBLAS: the main thread takes one, the thread of backward
    another; a bias may go through cuBLASLt, with a workspace of its own or the same.
    """
    import torch

    size = asked["size"]
    settings: Any = {"dtype": getattr(torch, asked["dtype"]), "device": bench.device}
    x = torch.ones(size, size, requires_grad=True, **settings)
    weight = torch.ones(size, size, requires_grad=True, **settings)
    bias, gradient = torch.ones(size, **settings), torch.ones(size, size, **settings)
    before = bench.allocated()
    out = x @ weight
    forward = bench.allocated() - before - _bytes(out)
    before = bench.allocated()
    torch.autograd.backward(out, gradient)
    assert x.grad is not None
    assert weight.grad is not None
    backward = bench.allocated() - before - _bytes(x.grad) - _bytes(weight.grad)
    with torch.no_grad():
        before = bench.allocated()
        biased = torch.nn.functional.linear(x, weight, bias)
        of_bias = bench.allocated() - before - _bytes(biased)
    return {"first_forward": forward, "first_backward": backward, "first_bias": of_bias}


def _attention_backward(bench: Bench, asked: Arguments) -> Values:
    """Return what one attention takes: in forward, kept for backward, and in backward.

    Shapes:
        queries, keys and values   [b, heads, s, d], laid out [b, s, heads, d] as models do
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if asked["backend"] not in backends:
        raise InvalidRequestError(
            f"unknown backend {asked['backend']!r}; known: {', '.join(backends)}"
        )
    if bench.fake and asked["backend"] == "cudnn":
        raise _UnknownHereError("cuDNN's attention is not simulated")

    def heads(count: int) -> Any:
        shape = (asked["batch"], asked["seq_len"], count, asked["head_dim"])
        made = torch.ones(shape, dtype=getattr(torch, asked["dtype"]), device=bench.device)
        return made.transpose(1, 2).detach().requires_grad_()

    query, key, value = heads(asked["heads"]), heads(asked["kv_heads"]), heads(asked["kv_heads"])
    before = bench.allocated()
    bench.reset_peak()
    with sdpa_kernel([backends[asked["backend"]]]), _only(bench, asked["backend"]):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=asked["heads"] != asked["kv_heads"]
        )
    forward, kept = bench.peak() - before, bench.allocated() - before
    gradient = torch.ones_like(out)
    before = bench.allocated()
    bench.reset_peak()
    torch.autograd.backward(out, gradient)
    return {"forward": forward, "kept": kept, "backward": bench.peak() - before}


def _only(bench: Bench, backend: str) -> Any:
    """Let fake tensors take this kernel; a GPU has been told already."""
    import contextlib

    if not bench.fake:
        return contextlib.nullcontext()
    from profiler.cuda_semantics import cuda_semantics

    return cuda_semantics((8, 0), backend)  # type: ignore[arg-type]  # one of its names


def _embedding_backward(bench: Bench, asked: Arguments) -> Values:
    """Return what the backward of one embedding takes, its gradient included and alone."""
    import torch

    shape = (asked["vocab_size"], asked["hidden_size"])
    dtype = getattr(torch, asked["dtype"])
    weight = torch.ones(shape, dtype=dtype, device=bench.device, requires_grad=True)
    ids = torch.arange(asked["tokens"], device=bench.device)
    ids.remainder_(asked["vocab_size"])
    out = torch.nn.functional.embedding(ids, weight)
    gradient = torch.ones_like(out)
    before = bench.allocated()
    bench.reset_peak()
    torch.autograd.backward(out, gradient)
    assert weight.grad is not None
    return {"backward": bench.peak() - before, "gradient": _bytes(weight.grad)}


def _bnb_4bit_threshold(bench: Bench, asked: Arguments) -> Values:
    """Return what one product with a 4-bit weight takes in forward, its output included and alone.

    Source: bitsandbytes/backends/cuda/ops.py, gemm_4bit.
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise MissingDependencyError("the probe of 4-bit products needs bitsandbytes") from error
    from profiler.quantizations import bnb_4bit

    dtype = getattr(torch, asked["dtype"])
    with unset_fake_temporarily(), torch.device("meta"):
        # A fake tensor cannot be of bitsandbytes' class of weights.
        layer: Any = Linear4bit(
            asked["in_features"],
            asked["out_features"],
            bias=False,
            compute_dtype=dtype,
            compress_statistics=asked["double_quant"],
            quant_type="nf4",
        )
    layer.stored_dtype = dtype
    bnb_4bit.pack(layer, bench.device)
    if not bench.fake:
        bnb_4bit.fill(layer)
    shape = (1, asked["tokens"], asked["in_features"])
    x = torch.ones(shape, dtype=dtype, device=bench.device, requires_grad=True)
    # A first product takes cuBLAS's workspace.
    small = torch.ones(64, 64, dtype=dtype, device=bench.device)
    small @ small
    before = bench.allocated()
    bench.reset_peak()
    out = layer(x)
    return {"forward": bench.peak() - before, "output": _bytes(out)}


def _bytes(tensor: Any) -> int:
    """Return the bytes of the block that a fresh small tensor takes."""
    return round_up(tensor.numel() * tensor.element_size(), _BLOCK)


class _UnknownHereError(EstimatorError):
    """A probe that this device has no answer to."""


PROBES: Final[dict[str, Look]] = {
    "context": Look(
        "device memory of the process beside the allocator's: before the first tensor, and after "
        "steps of a small model",
        {"hidden_size": 1024, "num_layers": 2, "seq_len": 512},
        lambda *_: {},
    ),
    "cublas_workspace": Look(
        "what the first matrix products leave allocated",
        {"size": 256, "dtype": "bfloat16"},
        _cublas_workspace,
    ),
    "attention_backward": Look(
        "one attention by itself, by kernel",
        {
            "backend": "flash",
            "batch": 1,
            "seq_len": 2048,
            "heads": 32,
            "kv_heads": 32,
            "head_dim": 128,
            "dtype": "bfloat16",
        },
        _attention_backward,
    ),
    "embedding_backward": Look(
        "the backward of one embedding, which sorts above 3072 tokens",
        {"tokens": 3072, "vocab_size": 32000, "hidden_size": 4096, "dtype": "bfloat16"},
        _embedding_backward,
    ),
    "bnb_4bit_threshold": Look(
        "one product with a 4-bit weight, which is unpacked whole from a number of tokens on that "
        "bitsandbytes chooses by the card and the shape, 1537 at most",
        {
            "tokens": 1536,
            "in_features": 4096,
            "out_features": 4096,
            "double_quant": True,
            "dtype": "bfloat16",
        },
        _bnb_4bit_threshold,
    ),
}
"""What can be looked at, by name."""


def measured(name: str, arguments: Arguments, device: Device, options: Options) -> Probe:
    """Look at a device and return the record; a look that fails is recorded as an error.

    Args:
        name: one of `PROBES`.
        arguments: where they differ from the probe's own.
        device: used by nobody before.
        options: the lock, the limit, and what the record is called.

    Raises:
        EstimatorError: no such probe or argument, or no device.
    """
    asked = _arguments(name, arguments)
    device.check()
    outcome: Outcome = "ok"
    reason, values = None, {}
    try:
        values = _values(name, asked, device, options)
    except (InvalidRequestError, MissingDependencyError):
        raise
    except Exception as error:
        outcome = "out_of_memory" if device.ran_out(error) else "error"
        reason = one_line(error)
    return Probe(
        id=options.new_id(),
        origin=device.origin,
        group=options.group,
        name=name,
        arguments=asked,
        outcome=outcome,
        reason=reason,
        values=values,
        environment=device.environment(),
        recorded_at=now(),
    )


def _values(name: str, asked: Arguments, device: Device, options: Options) -> Values:
    if name == "context":
        return _context(asked, device, options)
    import torch

    torch.manual_seed(0)
    hold_lock(options.lock)
    device.open(options.limit_bytes)
    with device.bench() as bench:
        return PROBES[name].values(bench, asked)


def _context(asked: Arguments, device: Device, options: Options) -> Values:
    """Return the device memory that is not the allocator's, before and after three steps."""
    if isinstance(device, Simulated):
        # One constant stands for both; it is meant for after the step.
        return {"after_step": device.constants.context.expected}
    config = {
        "model_type": "llama",
        "hidden_size": asked["hidden_size"],
        "intermediate_size": 4 * asked["hidden_size"],
        "num_hidden_layers": asked["num_layers"],
        "num_attention_heads": asked["hidden_size"] // 64 or 1,
        "num_key_value_heads": asked["hidden_size"] // 64 or 1,
        "vocab_size": 32_000,
    }
    request = parse_request({"model": {"config": config}, "seq_len": asked["seq_len"]})
    run = measure(request, config, device, options)
    after = Gauge(device)
    after.close()
    used, held = after.peak.device_used_bytes, after.peak.reserved_bytes
    if run.outcome != "ok":
        raise RuntimeError(f"the step did not run: {run.reason}")
    if run.idle_bytes is None or used is None or held is None:
        raise RuntimeError("the driver does not say what others hold of the device")
    return {"idle": run.idle_bytes, "after_step": used - held}


def _arguments(name: str, given: Arguments) -> Arguments:
    """Return a probe's arguments, all of them.

    Raises:
        InvalidRequestError: no such probe, no such argument, or a value of another type.
    """
    if name not in PROBES:
        raise InvalidRequestError(f"unknown probe {name!r}; known: {', '.join(PROBES)}")
    defaults = PROBES[name].defaults
    for key, value in given.items():
        if key not in defaults:
            raise InvalidRequestError(
                f"probe {name!r} has no argument {key!r}; it has {', '.join(defaults)}"
            )
        if type(value) is not type(defaults[key]) or (type(value) is int and value < 1):
            raise InvalidRequestError(
                f"argument {key!r} of probe {name!r} is like {defaults[key]!r}, not {value!r}"
            )
    return {**defaults, **given}
