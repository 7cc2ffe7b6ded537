"""8-bit base weights as bitsandbytes stores them, and the memory that its int8 kernels take."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from unittest import mock

from profiler.quantizations import bnb_4bit

Buffers = Iterable[tuple[str, int]]

LIBRARY: Final = bnb_4bit.LIBRARY
QUANTIZE: Final = "bitsandbytes::int8_vectorwise_quant"
MULTIPLY: Final = "bitsandbytes::int8_scaled_mm"
MULTIPLY_MIXED: Final = "bitsandbytes::int8_mixed_scaled_mm"
# Largest weight of a row of random ones: they come out about as large as trained ones.
_SCALE: Final = 0.04


def with_linears(model: Any, quantization: Any, stored: str) -> Any:
    """Replace the linear layers of a meta model, as `from_pretrained` with BitsAndBytesConfig does.

    Args:
        model: on the meta device.
        quantization: of the request.
        stored: dtype of the checkpoint, in which biases stay.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.threshold)
    model = bnb_4bit.replaced(model, config, quantization, stored)
    model.is_loaded_in_8bit = True
    return model


def packs(module: Any) -> bool:
    """Whether a module is one of bitsandbytes' 8-bit linear layers, and no adapter around one."""
    return any(kind.__name__ == "Linear8bitLt" for kind in type(module).__mro__) and hasattr(
        module, "state"
    )


def pack(module: Any, device: str) -> None:
    """Give an 8-bit layer its integers and the scales of its rows; the values do not matter.

    Shapes:
        CB, which is the weight   [n, k]   int8
        SCB                       [n]      fp32

    Source: bitsandbytes/nn/modules.py, Int8Params._quantize and Linear8bitLt.init_8bit_state.
    """
    import torch

    shape = module.weight.shape
    # A plain parameter: the subclass of bitsandbytes would try to quantize it on the device.
    codes = torch.zeros(shape, dtype=torch.int8, device=device)
    module.weight = torch.nn.Parameter(codes, requires_grad=False)
    module.weight.CB = module.weight.SCB = None
    module.state.CB = module.weight.data
    module.state.SCB = torch.ones(shape[0], device=device)


def fill(module: Any) -> None:
    """Make a packed layer on a real device bitsandbytes' own, with weights of the usual size."""
    from bitsandbytes.nn import Int8Params

    codes = module.state.CB
    codes.random_(-127, 128)
    module.state.SCB.fill_(_SCALE)
    module.weight = Int8Params(codes, requires_grad=False)


def seen_dtype(_: Any) -> Any:
    """Return the type of the packed weight."""
    import torch

    return torch.int8


def tensors(module: Any) -> dict[str, Any]:
    """Return what a packed layer keeps beside its weight, by name."""
    return {"weight.SCB": module.state.SCB}


@contextlib.contextmanager
def on_cuda() -> Iterator[None]:
    """Let bitsandbytes take the product that it takes on CUDA.

    On a CPU its training takes a function of its own. It also warns of every cast to fp16.

    Source: bitsandbytes/autograd/_functions.py, `matmul`.
    """
    try:
        import bitsandbytes
        from bitsandbytes.autograd import _functions
    except ImportError:
        yield
        return

    def matmul(
        tensor: Any,
        weight: Any,
        out: Any = None,
        state: Any = None,
        threshold: float = 0.0,
        bias: Any = None,
    ) -> Any:
        if threshold > 0.0:
            state.threshold = threshold
        return _functions.MatMul8bitLt.apply(tensor, weight, out, bias, state)

    level = _functions.logger.level
    _functions.logger.setLevel(logging.ERROR)
    try:
        with mock.patch.object(bitsandbytes, "matmul", matmul):
            yield
    finally:
        _functions.logger.setLevel(level)


def kernels() -> dict[str, Callable[..., Any]]:
    """Return what stands for the operators whose results depend on values: no column is outlying.

    Source: bitsandbytes/backends/cuda/ops.py, `int8_vectorwise_quant`; backends/default/ops.py,
    `int8_mixed_scaled_mm`.
    """
    import torch

    def quantize(tensor: Any, threshold: float = 0.0) -> Any:
        codes = torch.empty(tensor.shape, dtype=torch.int8, device=tensor.device)
        scales = tensor.new_empty(tensor.numel() // tensor.shape[-1], dtype=torch.float32)
        columns = tensor.new_empty(0, dtype=torch.int64) if threshold > 0.0 else None
        return codes, scales, columns

    def multiply_mixed(
        tensor: Any, codes: Any, weight: Any, scales: Any, weight_scales: Any, *_: Any, **__: Any
    ) -> Any:
        out = tensor.new_empty(*codes.shape[:-1], weight.shape[0])
        return out, tensor.new_empty(0)

    return {QUANTIZE: quantize, MULTIPLY_MIXED: multiply_mixed}


def quantization_buffers(args: tuple[Any, ...], _: Any) -> Buffers:
    """Bytes that the search for outliers takes beside its result.

    Shapes:
        absolute values   [t, k]   fp16
        outliers          [t, k]   bool

    Source: bitsandbytes/backends/cuda/ops.py, `int8_vectorwise_quant`.
    """
    threshold = args[1] if len(args) > 1 else 0.0
    if threshold > 0.0:
        yield "absolute values", args[0].element_size() * args[0].numel()
        yield "outliers", args[0].numel()


def product_buffers(_: tuple[Any, ...], out: Any) -> Buffers:
    """Bytes that a product of integers takes beside its result.

    Shapes:
        sums                                    [t, n]   int32
        fp16 output, where another is wanted    [t, n]   fp16

    Source: bitsandbytes/backends/cuda/ops.py, `int8_mm_dequant`.
    """
    import torch

    result = out[0] if isinstance(out, tuple) else out
    yield "int32 products", 4 * result.numel()
    if result.dtype != torch.float16:
        yield "fp16 output", 2 * result.numel()
