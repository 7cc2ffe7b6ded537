"""Gemma 2: norms on both sides of attention and MLP, every second layer slides, capped scores."""

from __future__ import annotations

from estimator.eager import ops
from estimator.eager.tensor import Tensor
from estimator.errors import InvalidConfigError
from estimator.model.config import Config
from estimator.model.families.gemma import (
    MLP,
    Gemma,
    decoder_modules,
    hidden_size,
    layer_kind,
    specification,
)
from estimator.model.families.llama import rotary_buffers
from estimator.model.forward import Forward
from estimator.model.spec import LayerKind, ModelSpec, Module, Norm

LAYER_TYPES = ("sliding_attention", "full_attention")
SLIDING_PERIOD = 2


class Gemma2(Gemma, frozen=True):
    """The forward pass of transformers' Gemma 2.

    Args:
        caps_logits: the head's logits are bent by tanh.
    """

    caps_logits: bool

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each between two norms and inside its residual.

        Source: hf-modeling, gemma2/modeling_gemma2.py, Gemma2DecoderLayer.forward.
        """
        residual = hidden
        hidden = run.centered_rms_norm(hidden, "input_layernorm")
        hidden = self.attention(run, kind, hidden)
        hidden = run.centered_rms_norm(hidden, "post_attention_layernorm")
        hidden = ops.add(residual, hidden, "residual")
        residual = hidden
        hidden = run.centered_rms_norm(hidden, "pre_feedforward_layernorm")
        hidden = run.gated_mlp(hidden, kind.facts["activation"], MLP)
        hidden = run.centered_rms_norm(hidden, "post_feedforward_layernorm")
        return ops.add(residual, hidden, "residual")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head and cap the logits, which keeps one more tensor of their size.

        Source: hf-modeling, gemma2/modeling_gemma2.py, Gemma2ForCausalLM.forward.
        """
        logits = run.linear(hidden, "lm_head")
        if self.caps_logits:
            logits = ops.scale(logits, "logits over the cap")
            logits = ops.tanh(logits)
            logits = ops.scale(logits, "capped logits")
        return logits


def read(config: Config) -> ModelSpec:
    """Return the specification of a Gemma 2 model.

    Source: hf-modeling, gemma2/modeling_gemma2.py, the `__init__` of its modules, and
    gemma2/configuration_gemma2.py, `layer_types`.
    """
    check_width(config)
    types = layer_types(config, SLIDING_PERIOD)
    distinct = tuple(dict.fromkeys(types))
    modules = decoder_modules(config, *sandwich_norms(config))
    kinds = tuple(
        layer_kind(
            config,
            layer_name(each),
            modules,
            window=window_of(config, each),
            softcap=config.number("attn_logit_softcapping", None) is not None,
        )
        for each in distinct
    )
    return specification(
        config,
        Gemma2(caps_logits(config)),
        kinds,
        tuple(distinct.index(each) for each in types),
        rotary_buffers(kinds[0].heads.width.value),
        supports_sdpa=False,
    )


def check_width(config: Config) -> None:
    """Refuse heads that do not divide the hidden size, whatever their own width is.

    Source: hf-modeling, gemma2/configuration_gemma2.py, validate_architecture.

    Raises:
        InvalidConfigError: the hidden size is no multiple of the heads.
    """
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if hidden % heads:
        raise InvalidConfigError(
            f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, as a "
            f"{config.model_type} model needs"
        )


def caps_logits(config: Config) -> bool:
    """Whether the head's logits are bent by tanh."""
    return config.number("final_logit_softcapping", None) is not None


def sandwich_norms(config: Config) -> tuple[Module, ...]:
    """Return the two norms around the MLP."""
    hidden = hidden_size(config)
    return (
        Norm(name="pre_feedforward_layernorm", width=hidden),
        Norm(name="post_feedforward_layernorm", width=hidden),
    )


def layer_types(config: Config, period: int) -> tuple[str, ...]:
    """Return the type of each layer; without `layer_types`, every `period`-th is full.

    Raises:
        InvalidConfigError: a type that the family does not have.
    """
    layers = config.count("num_hidden_layers")
    given = config.layer_types(layers)
    if given is None:
        return tuple(LAYER_TYPES[(index + 1) % period == 0] for index in range(layers))
    for each in given:
        if each not in LAYER_TYPES:
            raise InvalidConfigError(
                f"layer_types of a {config.model_type} model knows {', '.join(LAYER_TYPES)}, "
                f"not {each!r}"
            )
    return given


def window_of(config: Config, layer_type: str) -> int | None:
    """Return the tokens that a layer of this type looks back, None where it sees all."""
    return config.count("sliding_window") if layer_type == "sliding_attention" else None


def layer_name(layer_type: str) -> str:
    """Return what a layer of this type is called in the output."""
    return "sliding layer" if layer_type == "sliding_attention" else "layer"
