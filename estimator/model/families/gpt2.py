"""GPT-2: learned positions, pre-norm layers, a fused projection stored transposed, dropout."""

from __future__ import annotations

from functools import partial

from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.size import BATCH, ONE, SEQ, Dim, dim
from estimator.eager.tensor import Tensor, view
from estimator.errors import InvalidConfigError, UnsupportedModelError
from estimator.model.config import Config
from estimator.model.forward import Forward
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Norm
from estimator.sources import Cite

_MODEL = Cite("hf-modeling", "gpt2/modeling_gpt2.py, GPT2Model.forward")


class Gpt2:
    """The forward pass of transformers' GPT2LMHeadModel.

    Args:
        dropout: on the sum of token and position embeddings (`embd_pdrop`).
    """

    def __init__(self, dropout: float) -> None:
        self.dropout = dropout

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Add the embeddings of tokens and positions; the positions are one row for all.

        Source: hf-modeling, gpt2/modeling_gpt2.py, GPT2Model.forward.
        """
        tokens = run.embedding(ids, "wte")
        numbers = run.names.get("position_ids")
        if numbers is None:
            numbers = run.tape.new("position_ids", (ONE, SEQ), DType.INT64, _MODEL)
        positions = run.embedding(numbers, "wpe")
        run.names.update(position_ids=numbers, position_embeds=positions)
        hidden = ops.add(tokens, positions, "sum of embeddings")
        return ops.dropout(hidden, self.dropout)

    def layer(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: hf-modeling, gpt2/modeling_gpt2.py, GPT2Block.forward.
        """
        dropout = kind.facts["dropout"]
        residual = hidden
        hidden = run.layer_norm(hidden, "ln_1")
        attn_output = run.prompted(kind, hidden, self.attention(run, kind, hidden))
        hidden = run.add_residual(attn_output, residual, "attention_adapters")
        residual = hidden
        hidden = run.layer_norm(hidden, "ln_2")
        feed_forward = run.plain_mlp(
            hidden, kind.facts["activation"], ("mlp.c_fc", "mlp.c_proj"), dropout
        )
        return run.add_residual(feed_forward, residual, "output_adapters")

    def attention(self, run: Forward, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Project to queries, keys and values at once, attend, project.

        Source: hf-modeling, gpt2/modeling_gpt2.py, GPT2Attention.forward.
        """
        width = run.spec.hidden
        heads = (BATCH, SEQ, kind.heads.query, kind.heads.width)
        q, k, v = ops.split_last(run.linear(hidden, "attn.c_attn"), (width, width, width))
        q, k, v = view(q, heads), view(k, heads), view(v, heads)
        out = run.attend(kind, q, k, v, kind.facts["attention_dropout"])
        out = run.linear(out, "attn.c_proj")
        return ops.dropout(out, kind.facts["dropout"])

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return run.layer_norm(hidden, "ln_f")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head."""
        return run.linear(hidden, "lm_head")


def read(config: Config) -> ModelSpec:
    """Return the specification of a GPT-2 model.

    Source: hf-modeling, gpt2: the `__init__` of its modules.

    Raises:
        InvalidConfigError: the heads do not divide the width.
        UnsupportedModelError: cross attention, or attention scores that are upcast.
    """
    for flag in ("add_cross_attention", "reorder_and_upcast_attn"):
        if config.flag(flag, False):
            raise UnsupportedModelError(f"GPT-2 with {flag} has no source here yet")
    hidden = dim("h", config.count("n_embd"))
    vocab = dim("V", config.count("vocab_size"))
    positions = config.count("n_positions")
    return ModelSpec(
        model_type=config.model_type,
        family=Gpt2(config.fraction("embd_pdrop", 0.1)),
        hidden=hidden,
        vocab=vocab,
        embeddings=(
            Embedding(name="wte", rows=vocab, width=hidden),
            Embedding(name="wpe", rows=dim("positions", positions), width=hidden),
        ),
        kinds=(_layer(config, hidden),),
        pattern=(0,) * config.count("n_layer"),
        final=(Norm(name="ln_f", width=hidden, bias=True),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", True),
        layers_path="transformer.h",
        max_positions=positions,
        supports_flex=False,
        notes=config.notes,
    )


def _layer(config: Config, hidden: Dim) -> LayerKind:
    heads = config.count("n_head")
    if hidden.value % heads:
        raise InvalidConfigError(f"n_embd {hidden.value} is no multiple of n_head {heads}")
    ffn = dim("f", config.optional_count("n_inner") or 4 * hidden.value)
    fused = dim("3h", 3 * hidden.value)
    return LayerKind(
        name="layer",
        modules=(
            Norm(name="ln_1", width=hidden, bias=True),
            _conv("attn.c_attn", hidden, fused),
            _conv("attn.c_proj", hidden, hidden),
            Norm(name="ln_2", width=hidden, bias=True),
            _conv("mlp.c_fc", hidden, ffn),
            _conv("mlp.c_proj", ffn, hidden),
        ),
        heads=attention.heads(heads, heads, hidden.value // heads),
        # Its eager_attention_forward leaves the scores in their own type for the softmax.
        eager=partial(attention.eager, softmax_dtype=None),
        facts={
            "activation": config.text("activation_function", "gelu_new"),
            "attention_dropout": config.fraction("attn_pdrop", 0.1),
            "dropout": config.fraction("resid_pdrop", 0.1),
        },
    )


def _conv(name: str, fan_in: Dim, fan_out: Dim) -> Linear:
    """Return a Conv1D: a linear layer with a bias, whose weight is stored [in, out].

    Source: hf-library, pytorch_utils.py, Conv1D.
    """
    return Linear(name=name, fan_in=fan_in, fan_out=fan_out, bias=True, transposed=True)
