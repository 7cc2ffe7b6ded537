"""Gemma: Llama's layer with scaled embeddings, wide heads, and norms around one in fp32."""

from __future__ import annotations

from functools import partial

from msgspec import Struct

from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.size import BATCH, ONE, SEQ, Dim, dim
from estimator.eager.tensor import Tensor
from estimator.errors import UnsupportedModelError
from estimator.model.config import Config
from estimator.model.families.llama import rotary_buffers
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Embedding, LayerKind, Linear, ModelSpec, Module, Norm

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Gemma(Struct, frozen=True):
    """The forward pass of transformers' Gemma."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up, scale them, and make the rotary tables.

        Source: hf-modeling, gemma/modeling_gemma.py, GemmaTextScaledWordEmbedding.forward.
        """
        hidden = run.embedding(ids, "embed_tokens", scaled=True)
        self.prepare_rotary(run)
        return hidden

    def prepare_rotary(self, run: Forward) -> None:
        """Make the one pair of tables that all layers share."""
        run.prepare_rotary(run.spec.rotary_width)

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: hf-modeling, gemma/modeling_gemma.py, GemmaDecoderLayer.forward.
        """
        residual = hidden
        hidden = run.centered_rms_norm(hidden, "input_layernorm")
        hidden = self.attention(run, kind, hidden)
        hidden = ops.add(residual, hidden, "residual")
        residual = hidden
        hidden = run.centered_rms_norm(hidden, "post_attention_layernorm")
        hidden = run.gated_mlp(hidden, kind.facts["activation"], MLP)
        return ops.add(residual, hidden, "residual")

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project, normalise where the model does, rotate, attend, project.

        Source: hf-modeling, gemma/modeling_gemma.py, gemma2/modeling_gemma2.py and
        gemma3/modeling_gemma3.py, the forward of their attention.
        """
        query = (BATCH, SEQ, kind.heads.query, kind.heads.width)
        shared = (BATCH, SEQ, kind.heads.key_value, kind.heads.width)
        q = run.heads(run.linear(hidden, "self_attn.q_proj"), query)
        k = run.heads(run.linear(hidden, "self_attn.k_proj"), shared)
        v = run.value_heads(run.linear(hidden, "self_attn.v_proj"), shared)
        if run.has("self_attn.q_norm"):
            q = run.centered_rms_norm(q, "self_attn.q_norm")
            k = run.centered_rms_norm(k, "self_attn.k_norm")
        q, k = run.rotate(q, k, kind.facts["rotary"])
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        return run.linear(out, "self_attn.o_proj")

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.centered_rms_norm(hidden, "norm")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def read(config: Config) -> ModelSpec:
    """Return the specification of a Gemma model.

    Source: hf-modeling, gemma/modeling_gemma.py, the `__init__` of its modules.
    """
    kind = layer_kind(config, "layer", decoder_modules(config), activation="hidden_act")
    layers = (0,) * config.count("num_hidden_layers")
    return specification(config, Gemma(), (kind,), layers, rotary_buffers(kind.heads.width.value))


def specification(
    config: Config,
    family: Gemma,
    kinds: tuple[LayerKind, ...],
    pattern: tuple[int, ...],
    buffers: tuple[Buffer, ...],
    *,
    supports_sdpa: bool = True,
) -> ModelSpec:
    """Return the specification that all Gemma models share around their layers.

    Raises:
        UnsupportedModelError: the model attends in both directions.
    """
    if config.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError(
            f"a {config.model_type} model with use_bidirectional_attention is not supported yet; "
            "only causal language models are"
        )
    hidden, vocab = hidden_size(config), dim("V", config.count("vocab_size"))
    return ModelSpec(
        model_type=config.model_type,
        family=family,
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="embed_tokens", rows=vocab, width=hidden),),
        kinds=kinds,
        pattern=pattern,
        final=(Norm(name="norm", width=hidden),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", True),
        buffers=(Buffer("embed_tokens.embed_scale", (ONE,), DType.FLOAT32), *buffers),
        rotary_width=kinds[0].heads.width.value,
        supports_sdpa=supports_sdpa,
        notes=config.notes,
    )


def hidden_size(config: Config) -> Dim:
    """Return the width of the hidden states."""
    return dim("h", config.count("hidden_size"))


def layer_kind(
    config: Config,
    name: str,
    modules: tuple[Module, ...],
    *,
    activation: str = "hidden_activation",
    window: int | None = None,
    softcap: bool = False,
    rotary: str = "rotary",
) -> LayerKind:
    """Return one kind of decoder layer.

    Args:
        activation: the field that names the activation function.
        softcap: attention scores are bent by tanh, which FlashAttention does without a copy.
        rotary: the name of the rotary tables.
    """
    return LayerKind(
        name=name,
        modules=modules,
        heads=config.heads(),
        sliding_window=window,
        eager=partial(attention.eager, softcap=softcap),
        facts={
            "activation": config.text(activation, "gelu_pytorch_tanh"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "rotary": rotary,
        },
    )


def decoder_modules(config: Config, *more: Module) -> tuple[Module, ...]:
    """Return the modules that a layer of every Gemma model has, and those that are given."""
    heads, hidden = config.heads(), hidden_size(config)
    ffn = dim("f", config.count("intermediate_size"))
    query = dim("H·d", heads.query.value * heads.width.value)
    shared = dim("KV·d", heads.key_value.value * heads.width.value)
    bias = config.flag("attention_bias", False)
    return (
        Norm(name="input_layernorm", width=hidden),
        Linear(name="self_attn.q_proj", fan_in=hidden, fan_out=query, bias=bias),
        Linear(name="self_attn.k_proj", fan_in=hidden, fan_out=shared, bias=bias),
        Linear(name="self_attn.v_proj", fan_in=hidden, fan_out=shared, bias=bias),
        Linear(name="self_attn.o_proj", fan_in=query, fan_out=hidden, bias=bias),
        Norm(name="post_attention_layernorm", width=hidden),
        Linear(name="mlp.gate_proj", fan_in=hidden, fan_out=ffn),
        Linear(name="mlp.up_proj", fan_in=hidden, fan_out=ffn),
        Linear(name="mlp.down_proj", fan_in=ffn, fan_out=hidden),
        *more,
    )
