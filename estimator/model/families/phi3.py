"""Phi-3, Phi-3.5 and Phi-4: Llama's layer with fused projections and dropout on the residuals."""

from __future__ import annotations

from estimator.eager import ops
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.model.config import Config
from estimator.model.families.llama import rotary_buffers
from estimator.model.forward import Forward, activate, head_by_head, rotated
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Norm


class Phi3:
    """The forward pass of transformers' Phi-3."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up and make the rotary tables; `embd_pdrop` is read by nobody."""
        hidden = run.embedding(ids, "embed_tokens")
        run.prepare_rotary(run.spec.rotary_width)
        return hidden

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm, with dropout, inside its residual.

        Source: hf-modeling, phi3/modeling_phi3.py, Phi3DecoderLayer.forward.
        """
        dropout = kind.facts["dropout"]
        residual = hidden
        hidden = run.rms_norm(hidden, "input_layernorm")
        hidden = self.attention(run, kind, hidden)
        hidden = ops.add(residual, ops.dropout(hidden, dropout), "residual")
        residual = hidden
        hidden = run.rms_norm(hidden, "post_attention_layernorm")
        hidden = self.mlp(run, kind, hidden)
        return ops.add(residual, ops.dropout(hidden, dropout), "residual")

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project to queries, keys and values at once, rotate, attend, project.

        Values are a view of the fused projection, which attention therefore keeps whole.

        Source: hf-modeling, phi3/modeling_phi3.py, Phi3Attention.forward.
        """
        heads = kind.heads
        qkv = run.linear(hidden, "self_attn.qkv_proj")
        query, shared = _query_width(kind), _shared_width(kind)
        q, k, v = ops.narrow(qkv, query), ops.narrow(qkv, shared), ops.narrow(qkv, shared)
        q = view(q, (BATCH, SEQ, heads.query, heads.width))
        k = view(k, (BATCH, SEQ, heads.key_value, heads.width))
        v = view(v, (BATCH, SEQ, heads.key_value, heads.width))
        q, k = rotate(run, q, k)
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        return run.linear(out, "self_attn.o_proj")

    def mlp(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run `down(up * act(gate))` on the halves of one projection.

        Source: hf-modeling, phi3/modeling_phi3.py, Phi3MLP.forward.
        """
        up = run.linear(hidden, "mlp.gate_up_proj")
        half = kind.facts["intermediate"]
        gate, up = ops.split_last(up, (half, half))
        up = ops.mul(up, activate(gate, kind.facts["activation"]), "gated product")
        return run.linear(up, "mlp.down_proj")

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.rms_norm(hidden, "norm")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def rotate(run: Forward, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Apply rotary positions to the first dimensions of each head and put the rest behind them.

    The rest is cut off and put back even where nothing is left, which copies both.

    Source: hf-modeling, phi3/modeling_phi3.py, apply_rotary_pos_emb.
    """
    cos, sin = run.rotary["rotary"]
    whole = q.shape[-1]
    rest = dim("d-rotary", whole.value - run.spec.rotary_width)
    q_rot, q_pass = _first(q, run.spec.rotary_width), ops.narrow(q, rest)
    k_rot, k_pass = _first(k, run.spec.rotary_width), ops.narrow(k, rest)
    with run.tape.module("rotary"):
        q_embed = head_by_head(ops.cat_last((rotated(q_rot, cos, sin), q_pass), whole))
        k_embed = head_by_head(ops.cat_last((rotated(k_rot, cos, sin), k_pass), whole))
    return q_embed, k_embed


def _first(x: Tensor, width: int) -> Tensor:
    """Return the first dimensions of each head; torch gives all of them without a slice."""
    return x if x.shape[-1].value == width else ops.narrow(x, dim("rotary", width))


def _query_width(kind: LayerKind) -> Dim:
    return dim("H·d", kind.heads.query.value * kind.heads.width.value)


def _shared_width(kind: LayerKind) -> Dim:
    return dim("KV·d", kind.heads.key_value.value * kind.heads.width.value)


def read(config: Config) -> ModelSpec:
    """Return the specification of a Phi-3 model.

    Source: hf-modeling, phi3/modeling_phi3.py, the `__init__` of its modules.
    """
    hidden = dim("h", config.count("hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    kind = _layer(config, hidden)
    rotary = int(kind.heads.width.value * config.rotary_fraction("partial_rotary_factor", 1.0))
    return ModelSpec(
        model_type=config.model_type,
        family=Phi3(),
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="embed_tokens", rows=vocab, width=hidden),),
        kinds=(kind,),
        pattern=(0,) * config.count("num_hidden_layers"),
        final=(Norm(name="norm", width=hidden),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", False),
        buffers=rotary_buffers(rotary),
        rotary_width=rotary,
        notes=config.notes,
    )


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads = config.heads()
    window = config.optional_count("sliding_window")
    ffn = config.count("intermediate_size")
    query = heads.query.value * heads.width.value
    fused = query + 2 * heads.key_value.value * heads.width.value
    return LayerKind(
        name="layer" if window is None else "sliding layer",
        modules=(
            Norm(name="input_layernorm", width=hidden),
            Linear(name="self_attn.o_proj", fan_in=dim("H·d", query), fan_out=hidden),
            Linear(name="self_attn.qkv_proj", fan_in=hidden, fan_out=dim("(H+2KV)·d", fused)),
            Norm(name="post_attention_layernorm", width=hidden),
            Linear(name="mlp.gate_up_proj", fan_in=hidden, fan_out=dim("2f", 2 * ffn)),
            Linear(name="mlp.down_proj", fan_in=dim("f", ffn), fan_out=hidden),
        ),
        heads=heads,
        sliding_window=window,
        facts={
            "activation": config.text("hidden_act", "silu"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "dropout": config.fraction("resid_pdrop", 0.0),
            "intermediate": dim("f", ffn),
        },
    )
