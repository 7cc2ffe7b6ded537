"""GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on part of each head."""

from __future__ import annotations

from estimator.eager import attention, ops
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.model.config import Config
from estimator.model.families.llama import rotary_buffers
from estimator.model.forward import Forward, head_by_head
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Norm


class GptNeoX:
    """The forward pass of transformers' GPTNeoXForCausalLM.

    Args:
        dropout: on the embeddings (`hidden_dropout`).
    """

    def __init__(self, dropout: float) -> None:
        self.dropout = dropout

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up and make the rotary tables.

        Source: hf-modeling, gpt_neox/modeling_gpt_neox.py, GPTNeoXModel.forward.
        """
        hidden = ops.dropout(run.embedding(ids, "embed_in"), self.dropout)
        run.prepare_rotary(run.spec.rotary_width)
        return hidden

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP on the same input, or the MLP on attention's residual.

        Source: hf-modeling, gpt_neox/modeling_gpt_neox.py, GPTNeoXLayer.forward.
        """
        dropout = kind.facts["dropout"]
        attn_output = self.attention(run, kind, hidden)
        attn_output = ops.dropout(attn_output, dropout)
        if kind.facts["parallel"]:
            mlp_output = self.mlp(run, kind, hidden)
            mlp_output = ops.dropout(mlp_output, dropout)
            return ops.add(ops.add(mlp_output, attn_output), hidden, "residual")
        attn_output = ops.add(attn_output, hidden, "residual")
        mlp_output = self.mlp(run, kind, attn_output)
        mlp_output = ops.dropout(mlp_output, dropout)
        return ops.add(mlp_output, attn_output, "residual")

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Norm, project to interleaved queries, keys and values, rotate, attend, project.

        Source: hf-modeling, gpt_neox/modeling_gpt_neox.py, GPTNeoXAttention.forward.
        """
        hidden = run.layer_norm(hidden, "input_layernorm")
        width = kind.heads.width
        fused = (BATCH, SEQ, kind.heads.query, dim("3d", 3 * width.value))
        qkv = view(run.linear(hidden, "attention.query_key_value"), fused)
        q, k, v = ops.split_last(qkv, (width, width, width))
        q, k = rotate_part(run, q, k)
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        return run.linear(out, "attention.dense")

    def mlp(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Norm and MLP.

        Source: hf-modeling, gpt_neox/modeling_gpt_neox.py, GPTNeoXMLP.forward.
        """
        hidden = run.layer_norm(hidden, "post_attention_layernorm")
        return run.plain_mlp(
            hidden, kind.facts["activation"], ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        )

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.layer_norm(hidden, "final_layer_norm")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def rotate_part(run: Forward, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Apply rotary positions to the first dimensions of each head and put the rest behind them.

    Source: hf-modeling, gpt_neox/modeling_gpt_neox.py, apply_rotary_pos_emb.
    """
    whole = q.shape[-1]
    rotated = dim("rotary", run.spec.rotary_width)
    rest = dim("d-rotary", whole.value - rotated.value)
    q_rot, q_pass = ops.narrow(q, rotated), ops.narrow(q, rest)
    k_rot, k_pass = ops.narrow(k, rotated), ops.narrow(k, rest)
    q_embed, k_embed = run.rotate(q_rot, k_rot)
    q_embed = head_by_head(ops.cat_last((q_embed, q_pass), whole))
    k_embed = head_by_head(ops.cat_last((k_embed, k_pass), whole))
    return q_embed, k_embed


def read(config: Config) -> ModelSpec:
    """Return the specification of a GPT-NeoX model.

    Source: hf-modeling, gpt_neox: the `__init__` of its modules.
    """
    hidden = dim("h", config.count("hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    kind = _layer(config, hidden)
    rotated = int(kind.heads.width.value * config.rotary_fraction("rotary_pct", 0.25))
    return ModelSpec(
        model_type=config.model_type,
        family=GptNeoX(config.fraction("hidden_dropout", 0.0)),
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="embed_in", rows=vocab, width=hidden),),
        kinds=(kind,),
        pattern=(0,) * config.count("num_hidden_layers"),
        final=(Norm(name="final_layer_norm", width=hidden, bias=True),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", False),
        layers_path="gpt_neox.layers",
        buffers=rotary_buffers(rotated),
        rotary_width=rotated,
        notes=config.notes,
    )


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads = config.heads()
    ffn = dim("f", config.count("intermediate_size"))
    fused = dim("3h", 3 * hidden.value)
    bias = config.flag("attention_bias", True)
    return LayerKind(
        name="layer",
        modules=(
            Norm(name="input_layernorm", width=hidden, bias=True),
            Norm(name="post_attention_layernorm", width=hidden, bias=True),
            Linear(name="attention.query_key_value", fan_in=hidden, fan_out=fused, bias=bias),
            Linear(name="attention.dense", fan_in=hidden, fan_out=hidden, bias=bias),
            Linear(name="mlp.dense_h_to_4h", fan_in=hidden, fan_out=ffn, bias=True),
            Linear(name="mlp.dense_4h_to_h", fan_in=ffn, fan_out=hidden, bias=True),
        ),
        heads=attention.heads(heads.query.value, heads.query.value, heads.width.value),
        facts={
            "activation": config.text("hidden_act", "gelu"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "dropout": config.fraction("hidden_dropout", 0.0),
            "parallel": config.flag("use_parallel_residual", True),
        },
    )
