"""BLOOM: ALiBi added inside the score product, a norm behind the embeddings, eager attention."""

from __future__ import annotations

from typing import Final

from estimator.eager import attention, ops
from estimator.eager.ops import F32
from estimator.eager.size import BATCH, ONE, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.errors import InvalidConfigError, UnsupportedModelError
from estimator.model.config import Config
from estimator.model.forward import Forward
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Norm
from estimator.sources import Cite

_ALIBI: Final = Cite("hf-modeling", "bloom/modeling_bloom.py, build_alibi_tensor")
_GELU: Final = Cite("hf-modeling", "bloom/modeling_bloom.py, GeLUFunction")
# `bloom_gelu_forward` holds this many tensors of the input's size at its worst, and
# `bloom_gelu_back` as many beside its result.
_GELU_TEMPORARIES: Final = 4


class Bloom:
    """The forward pass of transformers' BloomForCausalLM."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up, norm them, and build the biases of the positions.

        Shapes:
            alibi  [b, H, 1, s]  width of the hidden states

        Source: hf-modeling, bloom/modeling_bloom.py, BloomModel.forward.
        """
        embedded = run.embedding(ids, "word_embeddings")
        hidden = run.layer_norm(embedded, "word_embeddings_layernorm")
        (kind, *_) = run.spec.kinds
        shape = (BATCH, kind.heads.query, ONE, SEQ)
        alibi = run.tape.new("alibi in fp32", shape, F32, _ALIBI)
        run.masks["alibi"] = ops.cast(alibi, hidden.dtype, "alibi")
        return hidden

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: hf-modeling, bloom/modeling_bloom.py, BloomBlock.forward.
        """
        norm_output = run.layer_norm(hidden, "input_layernorm")
        residual = norm_output if kind.facts["residual_after_norm"] else hidden
        attention_output = self.attention(run, kind, norm_output, residual)
        norm_output = run.layer_norm(attention_output, "post_attention_layernorm")
        residual = norm_output if kind.facts["residual_after_norm"] else attention_output
        return self.mlp(run, kind, norm_output, residual)

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor, residual: Tensor) -> Tensor:
        """Project to interleaved queries, keys and values, attend, project, add the residual.

        Source: hf-modeling, bloom/modeling_bloom.py, BloomAttention.forward.
        """
        width, query = kind.heads.width, kind.heads.query
        fused = run.linear(hidden, "self_attention.query_key_value")
        split = view(fused, (BATCH, SEQ, query, dim("3", 3), width))
        q, k, v = (ops.part(split, (BATCH, SEQ, query, width)) for _ in range(3))
        k, v = run.through_cache(kind, k, v)
        q, k, v = (ops.head_by_head(each) for each in (q, k, v))
        scores = ops.matmul(q, k, attention.scores(kind.heads), "scores with alibi")
        weights = ops.add(scores, run.masks["full"], "masked scores")
        probs = ops.cast(ops.softmax(weights, F32), q.dtype)
        probs = ops.dropout(probs, kind.facts["attention_dropout"])
        context = ops.matmul(probs, v, (BATCH, query, SEQ, width), "context")
        context = ops.copy(context, (BATCH, SEQ, dim("h", query.value * width.value)), "merged")
        output = run.linear(context, "self_attention.dense")
        if run.tape.phase == "forward":
            # The layer returns its weights, and the model's loop keeps them for one more layer.
            run.names["attn_weights"] = probs
        return _dropout_add(output, residual, kind.facts["hidden_dropout"])

    def mlp(self, run: Forward, kind: LayerKind, hidden: Tensor, residual: Tensor) -> Tensor:
        """Run the MLP and add the residual.

        Source: hf-modeling, bloom/modeling_bloom.py, BloomMLP.forward.
        """
        hidden = _gelu(run.linear(hidden, "mlp.dense_h_to_4h"))
        output = run.linear(hidden, "mlp.dense_4h_to_h")
        return _dropout_add(output, residual, kind.facts["hidden_dropout"])

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.layer_norm(hidden, "ln_f")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def _gelu(x: Tensor) -> Tensor:
    """GELU as a function with a backward of its own: only the input is saved.

    Source: hf-modeling, bloom/modeling_bloom.py, GeLUFunction.
    """
    held = [x.tape.new("gelu temporary", x.shape, x.dtype, _GELU) for _ in range(_GELU_TEMPORARIES)]
    held.clear()
    return ops.unary(x, "gelu", keeps="input", scratch=_GELU_TEMPORARIES)


def _dropout_add(x: Tensor, residual: Tensor, p: float) -> Tensor:
    out = ops.dropout(x, p)
    return ops.add(residual, out, "residual")


def read(config: Config) -> ModelSpec:
    """Return the specification of a BLOOM model.

    Source: hf-modeling, bloom: the `__init__` of its modules.

    Raises:
        UnsupportedModelError: the slow path that multiplies in slices.
    """
    if config.flag("slow_but_exact", False) and config.count("pretraining_tp", 1) > 1:
        raise UnsupportedModelError(
            "BLOOM with slow_but_exact multiplies in slices, which has no source here yet; set "
            "slow_but_exact to false"
        )
    hidden = dim("h", config.count("n_embed" if config.has("n_embed") else "hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    layers = config.count("n_layer" if config.has("n_layer") else "num_hidden_layers")
    return ModelSpec(
        model_type=config.model_type,
        family=Bloom(),
        hidden=hidden,
        vocab=vocab,
        embeddings=(
            Embedding(name="word_embeddings", rows=vocab, width=hidden),
            Norm(name="word_embeddings_layernorm", width=hidden, bias=True),
        ),
        kinds=(_layer(config, hidden),),
        pattern=(0,) * layers,
        final=(Norm(name="ln_f", width=hidden, bias=True),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", True),
        layers_path="transformer.h",
        supports_sdpa=False,
        supports_flash=False,
        supports_flex=False,
        attention_interface=False,
        takes_positions=False,
        notes=config.notes,
    )


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads = config.count("n_head" if config.has("n_head") else "num_attention_heads")
    if hidden.value % heads:
        raise InvalidConfigError(f"hidden_size {hidden.value} is no multiple of n_head {heads}")
    fused, inner = dim("3h", 3 * hidden.value), dim("4h", 4 * hidden.value)
    linears = (
        ("self_attention.query_key_value", hidden, fused),
        ("self_attention.dense", hidden, hidden),
        ("mlp.dense_h_to_4h", hidden, inner),
        ("mlp.dense_4h_to_h", inner, hidden),
    )
    return LayerKind(
        name="layer",
        modules=(
            *(
                Linear(name=name, fan_in=fan_in, fan_out=fan_out, bias=True)
                for name, fan_in, fan_out in linears
            ),
            Norm(name="input_layernorm", width=hidden, bias=True),
            Norm(name="post_attention_layernorm", width=hidden, bias=True),
        ),
        heads=attention.heads(heads, heads, hidden.value // heads),
        facts={
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "hidden_dropout": config.fraction("hidden_dropout", 0.0),
            "residual_after_norm": config.flag("apply_residual_connection_post_layernorm", False),
        },
    )
