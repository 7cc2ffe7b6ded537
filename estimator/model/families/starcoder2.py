"""StarCoder2: LayerNorm, biases everywhere, grouped heads, a sliding window, a plain MLP."""

from __future__ import annotations

from estimator.eager import ops
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Tensor
from estimator.model.config import Config
from estimator.model.families.llama import rotary_buffers
from estimator.model.forward import Forward
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Norm


class Starcoder2:
    """The forward pass of transformers' StarCoder2.

    Args:
        dropout: on the embeddings (`embedding_dropout`).
    """

    def __init__(self, dropout: float) -> None:
        self.dropout = dropout

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up and make the rotary tables.

        Source: hf-modeling, starcoder2/modeling_starcoder2.py, Starcoder2Model.forward.
        """
        hidden = ops.dropout(run.embedding(ids, "embed_tokens"), self.dropout)
        run.prepare_rotary(run.spec.rotary_width)
        return hidden

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: hf-modeling, starcoder2/modeling_starcoder2.py, Starcoder2DecoderLayer.forward.
        """
        residual = hidden
        hidden = run.layer_norm(hidden, "input_layernorm")
        hidden = self.attention(run, kind, hidden)
        hidden = ops.add(residual, hidden, "residual")
        residual = hidden
        hidden = run.layer_norm(hidden, "post_attention_layernorm")
        hidden = run.plain_mlp(
            hidden, kind.facts["activation"], ("mlp.c_fc", "mlp.c_proj"), kind.facts["dropout"]
        )
        return ops.add(residual, hidden, "residual")

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project, rotate, attend, project, drop.

        Source: hf-modeling, starcoder2/modeling_starcoder2.py, Starcoder2Attention.forward.
        """
        query = (BATCH, SEQ, kind.heads.query, kind.heads.width)
        shared = (BATCH, SEQ, kind.heads.key_value, kind.heads.width)
        q = run.heads(run.linear(hidden, "self_attn.q_proj"), query)
        k = run.heads(run.linear(hidden, "self_attn.k_proj"), shared)
        v = run.value_heads(run.linear(hidden, "self_attn.v_proj"), shared)
        q, k = run.rotate(q, k)
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        out = run.linear(out, "self_attn.o_proj")
        return ops.dropout(out, kind.facts["dropout"])

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.layer_norm(hidden, "norm")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def read(config: Config) -> ModelSpec:
    """Return the specification of a StarCoder2 model.

    Source: hf-modeling, starcoder2/modeling_starcoder2.py, the `__init__` of its modules.
    """
    hidden = dim("h", config.count("hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    kind = _layer(config, hidden)
    return ModelSpec(
        model_type=config.model_type,
        family=Starcoder2(config.fraction("embedding_dropout", 0.0)),
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="embed_tokens", rows=vocab, width=hidden),),
        kinds=(kind,),
        pattern=(0,) * config.count("num_hidden_layers"),
        final=(Norm(name="norm", width=hidden, bias=True),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", True),
        buffers=rotary_buffers(kind.heads.width.value),
        rotary_width=kind.heads.width.value,
        notes=config.notes,
    )


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads = config.heads()
    ffn = dim("f", config.count("intermediate_size"))
    query = dim("H·d", heads.query.value * heads.width.value)
    shared = dim("KV·d", heads.key_value.value * heads.width.value)
    bias = config.flag("use_bias", True)
    window = config.optional_count("sliding_window")
    return LayerKind(
        name="layer" if window is None else "sliding layer",
        modules=(
            Norm(name="input_layernorm", width=hidden, bias=True),
            Linear(name="self_attn.q_proj", fan_in=hidden, fan_out=query, bias=bias),
            Linear(name="self_attn.k_proj", fan_in=hidden, fan_out=shared, bias=bias),
            Linear(name="self_attn.v_proj", fan_in=hidden, fan_out=shared, bias=bias),
            Linear(name="self_attn.o_proj", fan_in=query, fan_out=hidden, bias=bias),
            Norm(name="post_attention_layernorm", width=hidden, bias=True),
            Linear(name="mlp.c_fc", fan_in=hidden, fan_out=ffn, bias=bias),
            Linear(name="mlp.c_proj", fan_in=ffn, fan_out=hidden, bias=bias),
        ),
        heads=heads,
        sliding_window=window,
        facts={
            "activation": config.text("hidden_act", "gelu_pytorch_tanh"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "dropout": config.fraction("residual_dropout", 0.0),
        },
    )
