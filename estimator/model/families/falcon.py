"""Falcon: a fused projection, MLP beside attention, rotary positions or ALiBi in the mask."""

from __future__ import annotations

from typing import Final

from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.attention import MASK, Heads
from estimator.eager.ops import F32
from estimator.eager.size import BATCH, ONE, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.errors import InvalidConfigError
from estimator.model.config import Config
from estimator.model.families.llama import rotary_buffers
from estimator.model.forward import Forward
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Norm
from estimator.sources import Cite

_MODEL: Final = Cite("hf-modeling", "falcon/modeling_falcon.py, FalconModel.forward")
_ALIBI: Final = Cite("hf-modeling", "falcon/modeling_falcon.py, build_alibi_tensor")


class Falcon:
    """The forward pass of transformers' FalconForCausalLM.

    Args:
        alibi: positions are a bias on the scores instead of a rotation.
    """

    def __init__(self, *, alibi: bool) -> None:
        self.alibi = alibi

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up, build the mask that sdpa always gets here, and the rotary tables.

        Source: hf-modeling, falcon/modeling_falcon.py, FalconModel.forward.
        """
        hidden = run.embedding(ids, "word_embeddings")
        if not run.settings.is_flash:
            run.masks["full"] = self.mask(run)
        run.prepare_rotary(run.spec.rotary_width)
        return hidden

    def mask(self, run: Forward) -> Tensor:
        """Return the causal mask; with ALiBi its biases are written into it, head by head.

        Shapes:
            mask              [b, 1, s, s]  1 byte for sdpa, the width of the model for eager
            alibi             [b, H, 1, s]  width of the model
            mask with ALiBi   [b, H, s, s]  width of the model

        Source: hf-modeling, falcon/modeling_falcon.py, FalconModel.forward.
        """
        tape = run.tape
        mask = tape.new("attention mask", MASK, DType.BOOL, _MODEL)
        if self.alibi or run.settings.attention == "eager":
            mask = tape.new("attention mask as float", MASK, run.dtype, _MODEL)
        if not self.alibi:
            return mask
        (kind, *_) = run.spec.kinds
        heads = kind.heads.query
        alibi = tape.new("alibi in bfloat16", (BATCH, heads, ONE, SEQ), DType.BFLOAT16, _ALIBI)
        run.masks["alibi"] = alibi = ops.cast(alibi, run.dtype, "alibi")
        scaled = ops.scale(alibi, "scaled alibi")
        hidden = tape.new("masked places", MASK, DType.BOOL, _MODEL)
        mask = tape.new(
            "attention mask with alibi", attention.scores(kind.heads), run.dtype, _MODEL
        )
        del scaled, hidden
        return mask

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, beside each other or one behind the other.

        Source: hf-modeling, falcon/modeling_falcon.py, FalconDecoderLayer.forward.
        """
        residual = hidden
        if run.has("ln_attn"):
            attention_norm = run.layer_norm(hidden, "ln_attn")
            mlp_norm = run.layer_norm(hidden, "ln_mlp")
        else:
            attention_norm = mlp_norm = run.layer_norm(hidden, "input_layernorm")
        attention_output = self.attention(run, kind, attention_norm)
        if not kind.facts["parallel"]:
            residual = _dropout_add(attention_output, residual, kind.facts["attention_dropout"])
            mlp_norm = run.layer_norm(residual, "post_attention_layernorm")
        mlp_output = run.plain_mlp(
            mlp_norm, kind.facts["activation"], ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        )
        if kind.facts["parallel"]:
            mlp_output = ops.add_in_place(mlp_output, attention_output)
        return _dropout_add(mlp_output, residual, kind.facts["hidden_dropout"])

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project to queries, keys and values at once, rotate, attend, project.

        Source: hf-modeling, falcon/modeling_falcon.py, FalconAttention.forward.
        """
        fused = run.linear(hidden, "self_attention.query_key_value")
        q, k, v = _split_heads(fused, kind)
        if not self.alibi:
            q, k = run.rotate(q, k)
        if run.settings.attention != "eager":
            out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
            return run.linear(out, "self_attention.dense")
        k, v = run.through_cache(kind, k, v)
        weights = self.weights(run, kind, hidden.dtype, q, k)
        out = ops.matmul(weights, _every_head(v, kind.heads), _by_head(kind.heads), "output")
        out = ops.copy(out, (BATCH, SEQ, dim("H·d", run.spec.hidden.value)), "output by token")
        if run.tape.phase == "forward":
            # The layer returns its weights, and the model's loop keeps them for one more layer.
            run.names["attn_weights"] = weights
        return run.linear(out, "self_attention.dense")

    def weights(self, run: Forward, kind: LayerKind, dtype: DType, q: Tensor, k: Tensor) -> Tensor:
        """Return the attention weights of the eager path, in the type of the layer's input.

        Source: hf-modeling, falcon/modeling_falcon.py, FalconAttention.forward.
        """
        mask = run.masks["full"]
        scores = attention.scores(kind.heads)
        product = ops.matmul(q, _every_head(k, kind.heads), scores, "scores")
        if not self.alibi:
            product = ops.scale_in_place(product, "scores over the root of d")
            # No dropout here, unlike with ALiBi.
            return ops.softmax(ops.add(product, mask, "masked scores"), dtype)
        wide = ops.cast(product, F32, "scores in fp32")
        logits = ops.add(wide, run.masks["alibi"], "scores with alibi")
        logits = ops.scale_in_place(logits, "scaled scores")
        weights = ops.softmax(ops.add(logits, mask, "masked scores"), dtype)
        return ops.dropout(weights, kind.facts["attention_dropout"])

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.layer_norm(hidden, "ln_f")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def _dropout_add(x: Tensor, residual: Tensor, p: float) -> Tensor:
    out = ops.dropout(x, p)
    return ops.add(residual, out, "residual")


def _by_head(heads: Heads) -> tuple[Dim, ...]:
    return (BATCH, heads.query, SEQ, heads.width)


def _every_head(x: Tensor, heads: Heads) -> Tensor:
    return attention.every_head(x, heads) if heads.groups > 1 else x


def _split_heads(fused: Tensor, kind: LayerKind) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection; what is indexed with a list, or broadcast, is written out.

    Shapes:
        fused  [b, s, KV, H/KV + 2, d] with grouped heads, [b, s, H + 2, d] with one key head,
               [b, s, H, 3, d] otherwise

    Source: hf-modeling, falcon/modeling_falcon.py, FalconAttention._split_heads.
    """
    width, query = kind.heads.width, kind.heads.query
    groups: Dim | None = kind.facts["groups"]
    if groups is not None:
        members = query.value // groups.value
        inner = (BATCH, SEQ, groups, dim("H/KV + 2", members + 2), width)
        qkv = view(fused, inner)
        grouped = (BATCH, SEQ, groups, dim("H/KV", members), width)
        one = (BATCH, SEQ, groups, ONE, width)
        q, k, v = ops.part(qkv, grouped), ops.pick(qkv, one), ops.pick(qkv, one)
        every = (BATCH, SEQ, query, width)
        return (
            ops.copy(q, every, "queries"),
            ops.copy(k, every, "keys broadcast"),
            ops.copy(v, every, "values broadcast"),
        )
    shape = (BATCH, SEQ, query, width)
    if kind.heads.groups == 1:
        qkv = view(fused, (BATCH, SEQ, query, dim("3", 3), width))
        return ops.part(qkv, shape), ops.part(qkv, shape), ops.part(qkv, shape)
    qkv = view(fused, (BATCH, SEQ, dim("H + 2", query.value + 2), width))
    single = (BATCH, SEQ, kind.heads.key_value, width)
    return ops.part(qkv, shape), ops.pick(qkv, single), ops.pick(qkv, single)


def read(config: Config) -> ModelSpec:
    """Return the specification of a Falcon model.

    Source: hf-modeling, falcon: the `__init__` of its modules.

    Raises:
        InvalidConfigError: switches that transformers' own forward pass fails on.
    """
    hidden = dim("h", config.count("hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    alibi = config.flag("alibi", False)
    kind = _layer(config, hidden)
    return ModelSpec(
        model_type=config.model_type,
        family=Falcon(alibi=alibi),
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="word_embeddings", rows=vocab, width=hidden),),
        kinds=(kind,),
        pattern=(0,) * config.count("num_hidden_layers"),
        final=(Norm(name="ln_f", width=hidden, bias=True),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", True),
        layers_path="transformer.h",
        buffers=rotary_buffers(kind.heads.width.value),
        rotary_width=kind.heads.width.value,
        supports_flash=not alibi,
        supports_flex=False,
        attention_interface=False,
        takes_positions=False,
        broadcasts_keys=kind.heads.groups > 1,
        notes=config.notes,
    )


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads, groups, projected = _heads(config)
    bias = config.flag("bias", False)
    ffn = dim("f", config.optional_count("ffn_hidden_size") or 4 * hidden.value)
    qkv = dim("(H + 2·KV)·d", projected * heads.width.value)
    linears = (
        ("self_attention.query_key_value", hidden, qkv),
        ("self_attention.dense", hidden, hidden),
        ("mlp.dense_h_to_4h", hidden, ffn),
        ("mlp.dense_4h_to_h", ffn, hidden),
    )
    return LayerKind(
        name="layer",
        modules=(
            *(
                Linear(name=name, fan_in=fan_in, fan_out=fan_out, bias=bias, spelled_out=True)
                for name, fan_in, fan_out in linears
            ),
            *(Norm(name=name, width=hidden, bias=True) for name in _norms(config)),
        ),
        heads=heads,
        facts={
            "activation": config.text("activation", "gelu"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "groups": groups,
            "hidden_dropout": config.fraction("hidden_dropout", 0.0),
            "parallel": config.flag("parallel_attn", True),
        },
    )


def _heads(config: Config) -> tuple[Heads, Dim | None, int]:
    """Return the heads that attention sees, the groups they come from, and the heads projected.

    Grouped heads are written out for every query head before attention.

    Source: hf-modeling, falcon/modeling_falcon.py, FalconAttention.__init__.
    """
    query, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    if hidden % query:
        raise InvalidConfigError(
            f"hidden_size {hidden} is no multiple of num_attention_heads {query}"
        )
    width = hidden // query
    if config.flag("new_decoder_architecture", False):
        groups = config.optional_count("num_kv_heads") or query
        if query % groups:
            raise InvalidConfigError(
                f"num_attention_heads {query} is no multiple of num_kv_heads {groups}"
            )
        return attention.heads(query, query, width), dim("KV", groups), query + 2 * groups
    shared = 1 if config.flag("multi_query", True) else query
    return attention.heads(query, shared, width), None, query + 2 * shared


def _norms(config: Config) -> tuple[str, ...]:
    """Return the names of a layer's norms.

    Source: hf-modeling, falcon/modeling_falcon.py, FalconDecoderLayer.__init__ and forward.

    Raises:
        InvalidConfigError: the forward pass asks for norms that the layer does not make.
    """
    grouped = config.flag("new_decoder_architecture", False)
    parallel = config.flag("parallel_attn", True)
    norms = config.optional_count("num_ln_in_parallel_attn") or (2 if grouped else 1)
    if (grouped and not parallel) or (parallel and not grouped and norms == 2):
        raise InvalidConfigError(
            f"transformers has no Falcon layer with new_decoder_architecture={grouped}, "
            f"parallel_attn={parallel} and num_ln_in_parallel_attn={norms}"
        )
    if not parallel:
        return ("post_attention_layernorm", "input_layernorm")
    return ("ln_attn", "ln_mlp") if norms == 2 else ("input_layernorm",)
