"""Gemma 3 without images: Gemma 2's layer, norms on queries and keys, two rotary tables."""

from __future__ import annotations

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.model.config import Config
from estimator.model.families.gemma import decoder_modules, layer_kind, specification
from estimator.model.families.gemma2 import (
    Gemma2,
    caps_logits,
    check_width,
    layer_name,
    layer_types,
    sandwich_norms,
    window_of,
)
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, ModelSpec, Norm

SLIDING_PERIOD = 6


class Gemma3(Gemma2, frozen=True):
    """The forward pass of transformers' Gemma 3 without images."""

    def prepare_rotary(self, run: Forward) -> None:
        """Make a pair of tables for each type of layer.

        Source: hf-modeling, gemma3/modeling_gemma3.py, Gemma3TextModel.forward.
        """
        for kind in run.spec.kinds:
            run.prepare_rotary(run.spec.rotary_width, kind.facts["rotary"])


def read(config: Config) -> ModelSpec:
    """Return the specification of a Gemma 3 text model.

    Source: hf-modeling, gemma3/modeling_gemma3.py, the `__init__` of its modules, and
    gemma3/configuration_gemma3.py, `layer_types`.
    """
    check_width(config)
    types = layer_types(config, config.count("sliding_window_pattern", SLIDING_PERIOD))
    distinct = tuple(dict.fromkeys(types))
    width = config.heads().width
    modules = decoder_modules(
        config,
        *sandwich_norms(config),
        Norm(name="self_attn.q_norm", width=width),
        Norm(name="self_attn.k_norm", width=width),
    )
    kinds = tuple(
        layer_kind(config, layer_name(each), modules, window=window_of(config, each), rotary=each)
        for each in distinct
    )
    return specification(
        config,
        Gemma3(caps_logits(config)),
        kinds,
        tuple(distinct.index(each) for each in types),
        tuple(buffer for each in distinct for buffer in _rotary_buffers(each, width.value)),
    )


def _rotary_buffers(layer_type: str, width: int) -> tuple[Buffer, ...]:
    """Return the two fp32 frequency tables of one type of layer.

    Source: hf-modeling, gemma3/modeling_gemma3.py, Gemma3RotaryEmbedding.__init__.
    """
    shape = (dim("d/2", width // 2),)
    return tuple(
        Buffer(f"rotary_emb.{layer_type}_{name}", shape, DType.FLOAT32)
        for name in ("inv_freq", "original_inv_freq")
    )
