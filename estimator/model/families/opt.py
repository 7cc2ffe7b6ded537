"""OPT: learned positions, norms before or after each block, ReLU, dropout."""

from __future__ import annotations

from typing import Any

from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.errors import UnsupportedModelError
from estimator.model.config import Config
from estimator.model.forward import Forward, activate
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Module, Norm
from estimator.sources import Cite

_POSITIONS = Cite("hf-modeling", "opt/modeling_opt.py, OPTDecoder.forward")
# OPT's position table begins with rows that no token uses (OPTLearnedPositionalEmbedding).
_OFFSET = 2


class Opt:
    """The forward pass of transformers' OPTForCausalLM."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Add the embeddings of tokens, projected where they are narrower, and of positions.

        The positions are counted along the attention mask, for each row anew.

        Source: hf-modeling, opt/modeling_opt.py, OPTDecoder.forward and
        OPTLearnedPositionalEmbedding.forward.
        """
        tokens = run.embedding(ids, "embed_tokens")
        numbers = run.tape.new("position_ids", (BATCH, SEQ), DType.INT64, _POSITIONS)
        shifted = run.tape.new("position_ids + offset", (BATCH, SEQ), DType.INT64, _POSITIONS)
        positions = run.embedding(shifted, "embed_positions")
        del shifted
        if run.has("project_in"):
            tokens = run.linear(tokens, "project_in")
        run.names.update(position_ids=numbers, pos_embeds=positions, inputs_embeds=tokens)
        return ops.add(tokens, positions, "sum of embeddings")

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP; the norm of each stands before it or behind its residual.

        Source: hf-modeling, opt/modeling_opt.py, OPTDecoderLayer.forward.
        """
        norm_first, dropout = kind.facts["norm_first"], kind.facts["dropout"]
        residual = hidden
        if norm_first:
            hidden = run.layer_norm(hidden, "self_attn_layer_norm")
        hidden = self.attention(run, kind, hidden)
        hidden = ops.dropout(hidden, dropout)
        hidden = ops.add(residual, hidden, "residual")
        if not norm_first:
            hidden = run.layer_norm(hidden, "self_attn_layer_norm")
        residual = hidden = view(hidden, hidden.shape)
        if norm_first:
            hidden = run.layer_norm(hidden, "final_layer_norm")
        hidden = run.linear(hidden, "fc1")
        hidden = activate(hidden, kind.facts["activation"])
        hidden = run.linear(hidden, "fc2")
        hidden = ops.dropout(hidden, dropout)
        hidden = view(ops.add(residual, hidden, "residual"), hidden.shape)
        if not norm_first:
            hidden = run.layer_norm(hidden, "final_layer_norm")
        return hidden

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project, scale the queries, attend, project.

        Source: hf-modeling, opt/modeling_opt.py, OPTAttention.forward.
        """
        heads = (BATCH, SEQ, kind.heads.query, kind.heads.width)
        q = view(ops.scale(run.linear(hidden, "self_attn.q_proj"), "scaled query"), heads)
        k = view(run.linear(hidden, "self_attn.k_proj"), heads)
        v = view(run.linear(hidden, "self_attn.v_proj"), heads)
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        return run.linear(out, "self_attn.out_proj")

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm, and the projection to the width of the embeddings, where they are."""
        if run.has("final_layer_norm"):
            hidden = run.layer_norm(hidden, "final_layer_norm")
        if run.has("project_out"):
            hidden = run.linear(hidden, "project_out")
        return hidden

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def read(config: Config) -> ModelSpec:
    """Return the specification of an OPT model.

    Source: hf-modeling, opt: the `__init__` of its modules.

    Raises:
        UnsupportedModelError: layers that are dropped at random in training.
    """
    if config.fraction("layerdrop", 0.0):
        raise UnsupportedModelError(
            "OPT with layerdrop above 0 keeps a random number of layers, so no peak can be stated"
        )
    hidden = dim("h", config.count("hidden_size"))
    vocab = dim("V", config.count("vocab_size"))
    width = dim("e", config.optional_count("word_embed_proj_dim") or hidden.value)
    positions = config.count("max_position_embeddings")
    rows = dim("positions", positions + _OFFSET)
    kind = _layer(config, hidden)
    before: list[Module] = []
    after: list[Module] = []
    if kind.facts["norm_first"] and not config.flag("_remove_final_layer_norm", False):
        after.append(_norm(config, "final_layer_norm", hidden))
    if width.value != hidden.value:
        before.append(Linear(name="project_in", fan_in=width, fan_out=hidden))
        after.append(Linear(name="project_out", fan_in=hidden, fan_out=width))
    return ModelSpec(
        model_type=config.model_type,
        family=Opt(),
        hidden=hidden,
        vocab=vocab,
        embeddings=(
            Embedding(name="embed_tokens", rows=vocab, width=width),
            Embedding(name="embed_positions", rows=rows, width=hidden),
            *before,
        ),
        kinds=(kind,),
        pattern=(0,) * config.count("num_hidden_layers"),
        final=tuple(after),
        head=Linear(name="lm_head", fan_in=width, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", True),
        layers_path="model.decoder.layers",
        max_positions=positions,
        takes_positions=False,
        notes=config.notes,
    )


def _norm(config: Config, name: str, hidden: Dim) -> Norm:
    affine = config.flag("layer_norm_elementwise_affine", True)
    return Norm(name=name, width=hidden, bias=True, affine=affine)


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads = config.heads()
    ffn = dim("f", config.count("ffn_dim"))
    bias = config.flag("enable_bias", True)
    projections: list[Any] = [
        Linear(name=f"self_attn.{each}", fan_in=hidden, fan_out=hidden, bias=bias)
        for each in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    return LayerKind(
        name="layer",
        modules=(
            *projections,
            _norm(config, "self_attn_layer_norm", hidden),
            Linear(name="fc1", fan_in=hidden, fan_out=ffn, bias=bias),
            Linear(name="fc2", fan_in=ffn, fan_out=hidden, bias=bias),
            _norm(config, "final_layer_norm", hidden),
        ),
        heads=attention.heads(heads.query.value, heads.query.value, heads.width.value),
        facts={
            "activation": config.text("activation_function", "relu"),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "dropout": config.fraction("dropout", 0.1),
            "norm_first": config.flag("do_layer_norm_before", True),
        },
    )
