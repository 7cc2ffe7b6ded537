"""Make torch's CPU dispatch behave as its CUDA dispatch does, for as long as a step is traced.

Fake tensors cannot claim to be on CUDA in a build of torch without CUDA: the first autograd node
aborts the process, because no device guard is registered. So the step is traced on CPU tensors and
the few operators that choose another path on CUDA are re-registered while the context is open:
attention's choice of kernel, dropout's one-byte masks, the half-precision softmax and autocast's
lists. Everything else is composed of the same operators on both devices.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final
from unittest import mock

from profiler import attention

# ATen/autocast_mode.h of torch 2.13: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE,
# AT_FORALL_PROMOTE and AT_FORALL_LOWER_PRECISION_FP, as `name` or `name.overload`.
# Upsampling, convolution and recurrent cells are left out: no language model calls them.
AUTOCAST_FP32: Final = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
    "reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim",
    "cosine_similarity", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss",
    "binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp",
)  # fmt: skip
AUTOCAST_FP32_SET_OPT_DTYPE: Final = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "linalg_matrix_norm", "sum", "sum.dim_IntList",
)  # fmt: skip
AUTOCAST_PROMOTE: Final = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "scatter_add",
)  # fmt: skip
# These have the same kernel for both devices: the cast, and its cache of weights, is torch's own.
AUTOCAST_LOWER: Final = (
    "conv1d", "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv",
    "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "scaled_dot_product_attention",
)  # fmt: skip
# On CPU, autocast promotes these; on CUDA it leaves them alone.
AUTOCAST_CPU_ONLY: Final = ("stack", "cat", "index_copy")


@contextlib.contextmanager
def cuda_semantics(
    compute_capability: tuple[int, int], kernel: attention.Backend | None = None
) -> Iterator[None]:
    """Register the CUDA behaviour on the CPU dispatch keys; undone on exit.

    Args:
        compute_capability: of the GPU to imitate; attention's choice of kernel depends on it.
        kernel: the only one that attention may take (`torch.nn.attention.sdpa_kernel`).
    """
    import torch

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            # torch warns about each override; overriding is the point here.
            warnings.simplefilter("ignore")
            for name, composite in _composites(compute_capability, kernel).items():
                library.impl(name, composite, "AutogradCPU")
            for name, cast in _autocast_kernels().items():
                library.impl(name, cast, "AutocastCPU")
        with mock.patch.multiple(
            torch,
            is_autocast_enabled=_is_autocast_enabled,
            get_autocast_gpu_dtype=partial(torch.get_autocast_dtype, "cpu"),
        ):
            yield
    finally:
        library._destroy()


def _is_autocast_enabled(*device: str) -> bool:
    """Say whether autocast runs; asked without a device, as PEFT asks, torch means CUDA's."""
    import torch

    return bool(torch._C.is_autocast_enabled(*(device or ("cpu",))))


def _composites(
    compute_capability: tuple[int, int], only: attention.Backend | None
) -> dict[str, Callable[..., Any]]:
    """Return the composite operators whose C++ code asks `is_cuda()`."""
    import torch

    aten = torch.ops.aten

    def dropout(tensor: Any, p: float, train: bool) -> Any:
        """Follow aten/src/ATen/native/Dropout.cpp, `is_fused_kernel_acceptable`."""
        if not train or p == 0 or tensor.numel() == 0:
            return tensor
        return aten.native_dropout(tensor, p, train)[0]

    def softmax(tensor: Any, dim: int, dtype: Any = None) -> Any:
        """Follow aten/src/ATen/native/SoftMax.cpp: fp16 to fp32 inside the kernel."""
        if dtype == torch.float32 and tensor.dtype == torch.float16:
            return aten._softmax(tensor, dim, True)
        return aten._softmax(tensor if dtype is None else tensor.to(dtype), dim, False)

    def log_softmax(tensor: Any, dim: int, dtype: Any = None) -> Any:
        """Follow aten/src/ATen/native/SoftMax.cpp: fp16 to fp32 inside the kernel."""
        if dtype == torch.float32 and tensor.dtype == torch.float16:
            return aten._log_softmax(tensor, dim, True)
        return aten._log_softmax(tensor if dtype is None else tensor.to(dtype), dim, False)

    def linear(tensor: Any, weight: Any, bias: Any = None) -> Any:
        """Follow aten/src/ATen/native/Linear.cpp, without its branch for tensor subclasses.

        That branch adds the bias out of place, and any dispatch mode switches it on.
        """
        if bias is None:
            return torch.matmul(tensor, weight.t())
        if tensor.dim() == 2:
            return torch.addmm(bias, tensor, weight.t())
        if tensor.is_contiguous():
            flat = torch.addmm(bias, tensor.reshape(-1, tensor.shape[-1]), weight.t())
            return flat.view(*tensor.shape[:-1], weight.shape[0])
        return torch.matmul(tensor, weight.t()).add_(bias)

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        return attention.scaled_dot_product_attention(compute_capability, only, *args, **kwargs)

    return {
        "dropout": dropout,
        "softmax.int": softmax,
        "log_softmax.int": log_softmax,
        "linear": linear,
        "scaled_dot_product_attention": scaled_dot_product_attention,
    }


def _autocast_kernels() -> dict[str, Callable[..., Any]]:
    """Return what CUDA's autocast does for each operator where CPU's does something else."""
    import torch

    kernels: dict[str, Callable[..., Any]] = {}
    for name in AUTOCAST_FP32:
        kernels[name] = _below_autocast(name, _to_fp32)
    for name in AUTOCAST_FP32_SET_OPT_DTYPE:
        kernels[name] = _below_autocast(name, _with_fp32_dtype(name))
    for name in AUTOCAST_PROMOTE:
        kernels[name] = _below_autocast(name, _promoted)
    for name in AUTOCAST_CPU_ONLY:
        kernels[name] = torch.library.fallthrough_kernel
    return kernels


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _below_autocast(
    name: str, cast: Callable[[tuple[Any, ...], dict[str, Any]], _Arguments]
) -> Callable[..., Any]:
    """Return an autocast kernel: cast the arguments, then call the operator below autocast."""
    import torch

    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = cast(args, kwargs)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*args, **kwargs)

    return kernel


def _eligible(value: Any) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _cast(value: Any, dtype: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if _eligible(value) else value


def _to_fp32(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    import torch

    cast = {key: _cast(value, torch.float32) for key, value in kwargs.items()}
    return tuple(_cast(value, torch.float32) for value in args), cast


def _with_fp32_dtype(
    name: str,
) -> Callable[[tuple[Any, ...], dict[str, Any]], _Arguments]:
    import torch

    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload or "default")._schema
    position = [argument.name for argument in schema.arguments].index("dtype")

    def cast(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        given = args[position] if len(args) > position else kwargs.get("dtype")
        if given is not None or not _eligible(args[0]):
            return args, kwargs
        return args[:position], {**kwargs, **_named(schema, args, position)}

    def _named(schema: Any, args: tuple[Any, ...], position: int) -> dict[str, Any]:
        rest = {
            argument.name: value
            for argument, value in zip(
                schema.arguments[position + 1 :], args[position + 1 :], strict=False
            )
        }
        return {"dtype": torch.float32, **rest}

    return cast


def _promoted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    import torch

    tensors = [value for value in (*args, *kwargs.values()) if _eligible(value)]
    dtype = torch.get_autocast_dtype("cpu")
    if any(tensor.dtype == torch.float32 for tensor in tensors):
        dtype = torch.float32
    cast = {key: _cast(value, dtype) for key, value in kwargs.items()}
    return tuple(_cast(value, dtype) for value in args), cast
