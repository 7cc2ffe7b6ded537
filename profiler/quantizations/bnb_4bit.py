"""4-bit base weights as bitsandbytes stores them, and which of its kernels multiplies with them."""

from __future__ import annotations

from functools import cache
from typing import Any, Final
from unittest import mock

# bitsandbytes/functional.py, quantize_4bit: elements that share one scale, and scales that share
# one scale of their own.
LIBRARY: Final = "bitsandbytes"
BLOCK: Final = 64
NESTED_BLOCK: Final = 256
_CODES: Final = 16
_NESTED_CODES: Final = 256
# Scale of a block of random weights: they come out about as large as trained ones.
_SCALE: Final = 0.04


def with_linears(model: Any, quantization: Any, stored: str) -> Any:
    """Replace the linear layers of a meta model, as `from_pretrained` with BitsAndBytesConfig does.

    Args:
        model: on the meta device.
        quantization: of the request.
        stored: dtype of the checkpoint, in which biases stay.
    """
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.name,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.quant_storage),
    )
    model = replaced(model, config, quantization, stored)
    model.is_loaded_in_4bit = True
    return model


def replaced(model: Any, config: Any, quantization: Any, stored: str) -> Any:
    """Replace the linear layers that transformers would replace; their biases keep their type."""
    import torch
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    kept = HfQuantizer.get_modules_to_not_convert(
        model, list(quantization.skip_modules) or None, model._keep_in_fp32_modules
    )
    model = replace_with_bnb_linear(model, kept, quantization_config=config)
    for module in model.modules():
        if hasattr(module, "source_cls"):
            module.stored_dtype = getattr(torch, stored)
            if module.bias is not None:
                bias = module.bias.to(module.stored_dtype)
                module.bias = torch.nn.Parameter(bias, requires_grad=False)
    model.requires_grad_(False)
    return model


def packs(module: Any) -> bool:
    """Whether a module is one of bitsandbytes' 4-bit linear layers."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__) and hasattr(
        module, "quant_storage"
    )


def pack(module: Any, device: str) -> None:
    """Give a 4-bit layer its packed weight and its scales on a device; the values do not matter.

    Shapes:
        packed weight                    [n * k / 2, 1]      uint8, or fewer of a wider type
        scales                           [n * k / 64]        fp32; uint8 when quantized again
        code book                        [16]                fp32
        with double quantization: scales of scales [n * k / 64 / 256] fp32, their code book [256]
        fp32, and the mean of the scales, one fp32

    Source: bitsandbytes/functional.py, quantize_4bit and quantize_blockwise.
    """
    import torch
    from bitsandbytes.functional import QuantState

    weight = module.weight
    blocks = -(-weight.numel() // BLOCK)
    state: dict[str, Any] = {
        "shape": weight.shape,
        "code": torch.ones(_CODES, device=device),
        "blocksize": BLOCK,
        "quant_type": weight.quant_type,
        "dtype": module.stored_dtype,
    }
    if weight.compress_statistics:
        state["absmax"] = torch.zeros(blocks, dtype=torch.uint8, device=device)
        state["offset"] = torch.zeros((), device=device)
        state["state2"] = QuantState(
            absmax=torch.ones(-(-blocks // NESTED_BLOCK), device=device),
            code=torch.ones(_NESTED_CODES, device=device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    else:
        state["absmax"] = torch.ones(blocks, device=device)
    storage = module.quant_storage
    elements = (weight.numel() + 1) // (2 * storage.itemsize)
    packed = torch.zeros((elements, 1), dtype=storage, device=device)
    # A plain parameter: the subclass of bitsandbytes would try to quantize it on the device.
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    module.weight.quant_state = QuantState(**state)
    module.quant_state = module.weight.quant_state


def fill(module: Any) -> None:
    """Make a packed layer on a real device bitsandbytes' own, with weights of the usual size.

    Everything is written in place, so that nothing is allocated on the device.
    """
    import torch
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type
    from bitsandbytes.nn import Params4bit

    weight, state = module.weight, module.quant_state
    weight.data.view(torch.uint8).random_(0, 256)
    state.code.copy_(get_4bit_type(state.quant_type, device="cpu"))
    if state.nested:
        state.absmax.random_(0, 256)
        state.offset.fill_(_SCALE)
        state.state2.absmax.fill_(_SCALE / 10)
        state.state2.code.copy_(create_dynamic_map())
    else:
        state.absmax.fill_(_SCALE)
    module.weight = Params4bit(
        weight.data,
        quant_state=state,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=module.quant_storage,
        bnb_quantized=True,
    )


def dequantized(module: Any) -> Any:
    """Return the whole weight of a packed layer; before it is packed, a meta tensor of its shape.

    What PEFT's `dequantize_module_weight` does for a weight of bitsandbytes' own class, which a
    fake tensor cannot have.

    Source: peft, utils/integrations.py, dequantize_bnb_weight.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    if module.weight.is_meta:
        return torch.empty(module.weight.shape, dtype=module.stored_dtype, device="meta")
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def seen_dtype(module: Any) -> Any:
    """Return the type of the packed weight."""
    return module.quant_storage


def tensors(module: Any) -> dict[str, Any]:
    """Return what a packed layer keeps beside its weight, by name."""
    state = module.weight.quant_state
    kept = {"weight.absmax": state.absmax, "weight.code": state.code}
    if state.nested:
        kept |= {"weight.offset": state.offset, "weight.nested_absmax": state.state2.absmax}
        kept["weight.nested_code"] = state.state2.code
    return kept


@cache
def is_fused(
    compute_capability: tuple[int, int],
    multiprocessors: int,
    dtype: Any,
    tokens: int,
    out_features: int,
    in_features: int,
) -> bool:
    """Whether bitsandbytes multiplies with the packed weight and never unpacks the whole of it.

    Asks bitsandbytes' own heuristic, in a module that a build of torch without CUDA cannot import
    as it stands.

    Source: bitsandbytes/backends/cuda/ops.py, `gemm_4bit` and `_gemm_4bit_use_custom_cuda`.
    """
    import torch

    with mock.patch.object(
        torch._C,
        "_cuda_getCurrentRawStream",
        getattr(torch._C, "_cuda_getCurrentRawStream", None),
        create=True,
    ):
        from bitsandbytes.backends.cuda import ops

    if tokens > ops._gemm_4bit_custom_max_m or in_features % BLOCK:
        return False
    device = (multiprocessors, *compute_capability)
    with mock.patch.object(ops, "_gpu_dispatch_props", return_value=device):
        heuristic = ops._gemm_4bit_use_custom_cuda.__wrapped__
        return bool(heuristic(0, dtype, tokens, out_features, in_features))
