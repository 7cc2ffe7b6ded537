"""Llama, Mistral, Qwen 2 and Qwen 3: pre-norm layers, rotary positions, a gated MLP."""

from __future__ import annotations

from typing import Any

from estimator.dtypes import DType
from estimator.eager import attention
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Tensor
from estimator.model.config import Config
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Embedding, LayerKind, Linear, ModelSpec, Norm


class Llama:
    """The forward pass of transformers' Llama and of the classes that are generated from it."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up and make the rotary tables."""
        hidden = run.embedding(ids, "embed_tokens")
        run.prepare_rotary(run.spec.rotary_width)
        return hidden

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: hf-modeling, llama/modeling_llama.py, LlamaDecoderLayer.forward.
        """
        residual = hidden
        hidden = run.rms_norm(hidden, "input_layernorm")
        hidden = run.prompted(kind, hidden, self.attention(run, kind, hidden))
        hidden = run.add_residual(hidden, residual, "attention_adapters")
        residual = hidden
        hidden = run.rms_norm(hidden, "post_attention_layernorm")
        hidden = run.gated_mlp(
            hidden, kind.facts["activation"], ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        )
        return run.add_residual(hidden, residual, "output_adapters")

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project, rotate, attend, project.

        Source: hf-modeling, llama/modeling_llama.py, LlamaAttention.forward.
        """
        query = (BATCH, SEQ, kind.heads.query, kind.heads.width)
        shared = (BATCH, SEQ, kind.heads.key_value, kind.heads.width)
        q = run.heads(run.linear(hidden, "self_attn.q_proj"), query)
        if run.has("self_attn.q_norm"):
            q = run.rms_norm(q, "self_attn.q_norm")
        k = run.heads(run.linear(hidden, "self_attn.k_proj"), shared)
        if run.has("self_attn.k_norm"):
            k = run.rms_norm(k, "self_attn.k_norm")
        v = run.value_heads(run.linear(hidden, "self_attn.v_proj"), shared)
        q, k = run.rotate(q, k)
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        return run.linear(out, "self_attn.o_proj")

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.rms_norm(hidden, "norm")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def read(config: Config) -> ModelSpec:
    """Return the specification of a model of this family.

    Source: hf-modeling, llama, mistral, qwen2 and qwen3: the `__init__` of their modules.
    """
    hidden = dim("h", config.count("hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    kinds, pattern = _layers(config, hidden)
    head_width = kinds[0].heads.width
    return ModelSpec(
        model_type=config.model_type,
        family=Llama(),
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="embed_tokens", rows=vocab, width=hidden),),
        kinds=kinds,
        pattern=pattern,
        final=(Norm(name="norm", width=hidden),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", False),
        buffers=rotary_buffers(head_width.value),
        rotary_width=head_width.value,
        notes=config.notes,
    )


def rotary_buffers(width: int) -> tuple[Buffer, ...]:
    """Return the two fp32 frequency tables of a rotary embedding.

    Source: hf-modeling, llama/modeling_llama.py, LlamaRotaryEmbedding.__init__.
    """
    shape = (dim("d/2", width // 2),)
    return tuple(
        Buffer(name, shape, DType.FLOAT32)
        for name in ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
    )


def _layers(config: Config, hidden: Dim) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Return the kinds of layer and which each layer is."""
    windows = windows_of(config)
    distinct = tuple(dict.fromkeys(windows))
    kinds = tuple(_layer(config, hidden, window) for window in distinct)
    return kinds, tuple(distinct.index(window) for window in windows)


def windows_of(config: Config) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, None where attention is full.

    Source: hf-modeling, the configuration classes: Mistral slides in every layer, Qwen only with
    `use_sliding_window`, in the layers that `layer_types` names or from `max_window_layers` on.
    """
    layers = config.count("num_hidden_layers")
    if config.model_type == "mistral":
        return (config.optional_count("sliding_window"),) * layers
    types = config.layer_types(layers)
    if config.model_type not in ("qwen2", "qwen3") or not config.flag("use_sliding_window", False):
        return (None,) * layers
    window = config.optional_count("sliding_window")
    if types is not None:
        return tuple(window if each == "sliding_attention" else None for each in types)
    first = config.count("max_window_layers")
    return tuple(window if index >= first else None for index in range(layers))


def _layer(config: Config, hidden: Dim, window: int | None) -> LayerKind:
    heads = config.heads()
    ffn = dim("f", config.count("intermediate_size"))
    query = dim("H·d", heads.query.value * heads.width.value)
    shared = dim("KV·d", heads.key_value.value * heads.width.value)
    qkv_bias = config.model_type == "qwen2" or config.flag("attention_bias", False)
    out_bias = config.model_type != "qwen2" and config.flag("attention_bias", False)
    mlp_bias = config.flag("mlp_bias", False)
    modules: list[Any] = [
        Norm(name="input_layernorm", width=hidden),
        Linear(name="self_attn.q_proj", fan_in=hidden, fan_out=query, bias=qkv_bias),
        Linear(name="self_attn.k_proj", fan_in=hidden, fan_out=shared, bias=qkv_bias),
        Linear(name="self_attn.v_proj", fan_in=hidden, fan_out=shared, bias=qkv_bias),
        Linear(name="self_attn.o_proj", fan_in=query, fan_out=hidden, bias=out_bias),
    ]
    if config.model_type == "qwen3":
        modules += [
            Norm(name="self_attn.q_norm", width=heads.width),
            Norm(name="self_attn.k_norm", width=heads.width),
        ]
    modules += [
        Norm(name="post_attention_layernorm", width=hidden),
        Linear(name="mlp.gate_proj", fan_in=hidden, fan_out=ffn, bias=mlp_bias),
        Linear(name="mlp.up_proj", fan_in=hidden, fan_out=ffn, bias=mlp_bias),
        Linear(name="mlp.down_proj", fan_in=ffn, fan_out=hidden, bias=mlp_bias),
    ]
    return LayerKind(
        name="layer" if window is None else "sliding layer",
        modules=tuple(modules),
        heads=attention.heads(heads.query.value, heads.key_value.value, heads.width.value),
        sliding_window=window,
        facts={
            "activation": config.text("hidden_act", "silu"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
        },
    )
