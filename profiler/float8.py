"""Linear layers whose products are made in 8-bit floats, as the real libraries put them in place.

torchao's layers run on fake tensors as they are: everything that they allocate, they allocate
through torch, and `_scaled_mm` has a meta kernel. Transformer Engine's cannot be imported without
CUDA, so a stand-in takes their place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from estimator.request import EstimateRequest
from estimator.techniques.fp8_backends.transformer_engine import TransformerEngine

WRAPPERS: Final = frozenset({"Float8TrainingTensor"})
"""Tensor subclasses that unwrap themselves; what they then run is what is followed."""


def is_wrapped(types: Any) -> bool:
    """Whether an operator is given a tensor that unwraps itself."""
    return any(kind.__name__ in WRAPPERS for kind in types)


def convert(model: Any, request: EstimateRequest) -> None:
    """Replace the linear layers of a model, adapters included, where the request asks for it.

    Accelerate does so when the model is prepared, behind everything that builds it. Its wrapper of
    the weights for FSDP's 8-bit all-gather is left out: on one GPU it changes no tensor.

    Source: accelerate, utils/ao.py, convert_model_to_fp8_ao; torchtitan,
    components/quantization/float8.py, module_filter_fn.
    """
    if request.fp8 is None:
        return
    if isinstance(request.fp8, TransformerEngine):
        from profiler import transformer_engine

        transformer_engine.convert(model, request.fp8.amax_history_len)
        return
    from dataclasses import replace

    from accelerate.utils.ao import convert_model_to_fp8_ao, filter_linear_layers
    from torchao.float8 import Float8LinearConfig

    fp8 = request.fp8
    config = replace(
        Float8LinearConfig.from_recipe_name(fp8.recipe), pad_inner_dim=fp8.pad_inner_dim
    )
    chosen = None
    if fp8.filter_fqns is not None:
        chosen = partial(_is_converted, kept=fp8.filter_fqns, fits=filter_linear_layers)
    convert_model_to_fp8_ao(model, config=config, module_filter_func=chosen)


def _is_converted(module: Any, fqn: str, kept: tuple[str, ...], fits: Any) -> bool:
    """Leave out what accelerate leaves out by its size, and what is named."""
    return bool(fits(module, fqn, layers_to_filter=[])) and not any(name in fqn for name in kept)
