"""torchtune's own decoder, `torchtune/modules` of versions 0.1, 0.3 and 0.6.

Read from the same `config.json` as transformers' models. Norms and rotary positions are computed in
fp32, grouped keys and values are written out for every query head, and the recipe computes the
loss outside the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.attention import Heads
from estimator.eager.ops import F32, Grads, Out
from estimator.eager.size import BATCH, SEQ, Dim, Shape, dim
from estimator.eager.tensor import Node, Tensor, reshaped, view
from estimator.errors import UnsupportedCombinationError, UnsupportedModelError
from estimator.model.config import Config
from estimator.model.forward import Forward
from estimator.model.spec import Buffer, Embedding, LayerKind, Linear, ModelSpec, Norm, Weight
from estimator.sources import Cite

CHUNKS: Final = 8
_FAMILIES: Final = ("llama", "mistral")
_STRETCHED: Final = 131_072
_PAIR: Final = dim("2", 2)
_ROPE: Final = Cite("torchtune", "modules/position_embeddings.py, RotaryPositionalEmbeddings")
_LOSS: Final = Cite("torchtune-0-1", "recipes/lora_finetune_single_device.py, train")
_KERNEL: Final = Cite("torch-softmax", "cuda/SoftMax.cu, host_softmax")


class Decoder:
    """The forward pass of `TransformerDecoder` in version 0.6."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up; the rotary tables are buffers of the model."""
        hidden = run.embedding(ids, "tok_embeddings")
        # The forward uses one name for the hidden states of all layers.
        run.names.clear()
        return hidden

    def layer(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: torchtune, modules/transformer.py, TransformerSelfAttentionLayer.forward.
        """
        h = self.norm(run, x, "sa_norm")
        attn_out = self.attention(run, kind, h)
        h = ops.add(attn_out, x, "residual")
        mlp_out = run.gated_mlp(self.norm(run, h, "mlp_norm"), "silu", ("w1", "w3", "w2"))
        return ops.add(h, mlp_out, "residual")

    def norm(self, run: Forward, x: Tensor, name: str) -> Tensor:
        """RMSNorm in fp32, the product with the weight too.

        torch's fused kernel takes no weight of another type than its input, so this is composed of
        plain operators.

        Source: torchtune, modules/rms_norm.py, RMSNorm.forward; torch-layer-norm,
        rms_norm_composite.
        """
        with run.tape.module(name):
            given = ops.cast(x, F32)
            rqrst = ops.rsqrt(ops.shift_in_place(ops.mean_last(ops.power(given))))
            result = ops.mul(given, rqrst, "normalized")
            return ops.cast(ops.mul(result, run.norm_weight(name), "weighted"), x.dtype)

    def attention(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Project and rotate queries, then keys; write grouped heads out; attend; project.

        Source: torchtune, modules/attention.py, MultiHeadAttention.forward.
        """
        heads = kind.heads
        shared = (BATCH, SEQ, heads.key_value, heads.width)
        q = view(run.linear(x, "q_proj"), (BATCH, SEQ, heads.query, heads.width))
        q = rotated(run, kind, q)
        k, v = run.linear(x, "k_proj"), run.linear(x, "v_proj")
        k, v = view(k, shared), view(v, shared)
        k = rotated(run, kind, k)
        k = attention.repeat_heads(k, heads)
        v = attention.repeat_heads(v, heads)
        return self.attended(run, heads, q, k, v)

    def attended(self, run: Forward, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run SDPA, whose output lies by token, and project it.

        Source: torchtune, modules/attention_utils.py, _sdpa_or_flex_attention.
        """
        every = attention.heads(heads.query.value, heads.query.value, heads.width.value)
        kernel = attention.flash if q.dtype.is_half else _efficient
        output = kernel(q, k, v, every)
        width = dim("H·d", heads.query.value * heads.width.value)
        return run.linear(view(output, (BATCH, SEQ, width)), "output_proj")

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return self.norm(run, hidden, "norm")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head over an eighth of the positions at a time.

        Shapes:
            input of a chunk   [b, s/8, h]  copied where the micro-batch has several rows
            logits of a chunk  [b, s/8, V]

        Raises:
            UnsupportedCombinationError: the head has an adapter or a packed weight.

        Source: torchtune, modules/transformer.py, TransformerDecoder.chunked_output.
        """
        head = run.spec.head
        if head.adapter is not None or head.format is not None:
            raise UnsupportedCombinationError(
                "an adapter on the head has no sourced answer here with the versions of torchtune "
                "that run it in chunks; leave 'output' out of target_modules"
            )
        weight = run.param(head.name, head.weight())
        # A share of the positions has as many elements as the same share of the last dimension.
        shares = list(ops.split_last(hidden, (_eighth(run.spec.hidden),) * CHUNKS))
        parts = []
        while shares:
            chunk = shares.pop(0)
            if run.tape.regime.several_rows:
                chunk = ops.copy(chunk, name="hidden states of a chunk")
            with run.tape.module(head.name):
                parts.append(ops.linear(chunk, weight, None, _eighth(run.spec.vocab)))
        return Chunks(parts)


class EarlyDecoder(Decoder):
    """The same in version 0.1, of April 2024."""

    def layer(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Run attention and MLP, each behind its norm and inside its residual.

        Source: torchtune-0-1, torchtune/modules/transformer.py, TransformerDecoderLayer.forward.
        """
        attn_out = self.attention(run, kind, self.norm(run, x, "sa_norm"))
        h = ops.add(attn_out, x, "residual")
        mlp_out = run.gated_mlp(self.norm(run, h, "mlp_norm"), "silu", ("w1", "w3", "w2"))
        return ops.add(h, mlp_out, "residual")

    def norm(self, run: Forward, x: Tensor, name: str) -> Tensor:
        """RMSNorm in fp32 up to the product with the weight.

        Source: torchtune-0-1, torchtune/modules/rms_norm.py, RMSNorm.forward.
        """
        with run.tape.module(name):
            x_fp32 = ops.cast(x, F32)
            rsqrt = ops.rsqrt(ops.shift(ops.mean_last(ops.power(x_fp32))))
            x_normed = ops.cast(ops.mul(x_fp32, rsqrt, "normalized"), x.dtype)
            return ops.mul(x_normed, run.norm_weight(name), "weighted")

    def attention(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Project, write grouped heads out, rotate, attend, project.

        Source: torchtune-0-1, torchtune/modules/attention.py, CausalSelfAttention.forward.
        """
        heads = kind.heads
        shared = (BATCH, SEQ, heads.key_value, heads.width)
        every = (BATCH, SEQ, heads.query, heads.width)
        q, k, v = (run.linear(x, name) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = view(q, every), view(k, shared), view(v, shared)
        if heads.groups > 1:
            k = ops.copy(k, every, "heads repeated")
            v = ops.copy(v, every, "heads repeated")
        q = rotated(run, kind, q)
        k = rotated(run, kind, k)
        return self.attended(run, heads, q, k, v)

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head over all positions; `OneLoss` casts what it returns, as the model does."""
        return run.linear(hidden, "output")


class MiddleDecoder(EarlyDecoder):
    """The same in version 0.3, of September 2024: the layers of 0.1, the head in chunks of 0.6.

    Source: torchtune-0-3, torchtune/modules/transformer.py, TransformerDecoder.forward.
    """

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head over an eighth of the positions at a time."""
        return Decoder.logits(self, run, hidden)


def _efficient(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    return attention.efficient(q, k, v, None, heads)


def rotated(run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
    """Turn pairs of neighbours in fp32.

    Shapes:
        x in fp32         [b, s, H, d]    4 bytes, dies when the function returns
        four products     [b, s, H, d/2]  4 bytes, two at a time
        both of a pair    [b, s, H, d/2]  4 bytes
        stacked           [b, s, H, d]    4 bytes

    Source: torchtune, modules/position_embeddings.py, RotaryPositionalEmbeddings.forward.
    """
    with run.tape.module("pos_embeddings"):
        batch, tokens, heads, width = x.shape
        pairs: Shape = (batch, tokens, heads, dim("d/2", width.value // 2))
        table = run.param("pos_embeddings", kind.facts["table"])
        xshaped = view(ops.cast(x, F32), (*pairs, _PAIR))

        def product() -> Tensor:
            return ops.mul(ops.part(xshaped, pairs), table, "product")

        x_out = _stack([_difference(product(), product()), ops.add(product(), product(), "sum")])
        return ops.cast(view(x_out, x.shape), x.dtype)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """`x - y`; saves nothing, and the gradient of `y` is written out with its sign turned."""
    out = x.tape.new("difference", x.shape, x.dtype, Cite("torch-derivatives", "sub.Tensor"))

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        return grads[0], node.new_grad(1) if node.wants(1) else None

    x.tape.record("difference", (x, y), (), rule, out)
    return out


def _stack(parts: list[Tensor]) -> Tensor:
    """Stack along a new last dimension; backward gives each part a view of the gradient."""
    first = parts[0]
    out = first.tape.new(
        "stack", (*first.shape, _PAIR), first.dtype, Cite("torch-derivatives", "stack")
    )

    def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
        (grad,) = grads
        assert grad is not None
        return tuple(None if meta is None else reshaped(grad, meta[0]) for meta in node.metas)

    first.tape.record("stack", tuple(parts), (), rule, out)
    return out


def _eighth(size: Dim) -> Dim:
    """Return an eighth of a dimension: a chunk of s/8 positions has as many elements."""
    return dim(f"{size.letter}/{CHUNKS}", -(-size.value // CHUNKS))


class Chunks(Tensor):
    """The logits as a list of chunks."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[Tensor]) -> None:
        first = parts[0]
        super().__init__(first.tape, first.shape, first.dtype, None)
        self.parts = parts


class RecipeLoss:
    """A loss that the recipe computes when the model has returned.

    Args:
        source: where it is.
    """

    source: ClassVar[Cite]

    def rows(self, spec: ModelSpec, tokens: int) -> None:
        """Return None: the logits of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the recipe's loop holds."""
        raise NotImplementedError

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss."""
        raise NotImplementedError


class OneLoss(RecipeLoss):
    """`CrossEntropyLoss` over all logits, with the classes in the middle dimension.

    Source: torchtune-0-1, recipes/lora_finetune_single_device.py, train.
    """

    source = _LOSS

    def outputs(self, logits: Tensor) -> Tensor:
        """Cast the logits, and copy all positions but the last; the copy takes their name.

        Source: torchtune-0-1, torchtune/modules/transformer.py, TransformerDecoder.forward.
        """
        logits = ops.cast(logits, F32, "logits in fp32")
        return ops.copy(ops.part(logits, logits.shape), name="shifted logits")

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss; really over s - 1 positions.

        Shapes:
            shifted logits  [b, s, V]  4 bytes, which the loop's name keeps through backward
            copy            [b, V, s]  4 bytes, which the kernel makes of a transposed input
            log-softmax     [b, V, s]  4 bytes, saved
            gradients       [b, V, s]  4 bytes, two at a time

        Source: torchtune-0-1, recipes/lora_finetune_single_device.py, train; torch-softmax,
        cuda/SoftMax.cu, host_softmax.
        """
        tape = logits.tape
        turned = view(logits, (BATCH, vocab, SEQ))
        copy = tape.new("contiguous copy in log_softmax", turned.shape, F32, _KERNEL)
        log_probs = tape.new("log_softmax", turned.shape, F32, _KERNEL)
        del copy

        def rule(node: Node, grads: Grads, saved: list[Any]) -> Out:
            return (node.new_grad(0),)

        tape.record("log_softmax", (turned,), (log_probs,), rule, log_probs)
        return ops.nll_loss(log_probs, labels)


class EighthsLoss(RecipeLoss):
    """`CEWithChunkedOutputLoss`: cross entropy chunk by chunk.

    Source: torchtune, modules/loss/ce_chunked_output_loss.py, CEWithChunkedOutputLoss.
    """

    source = Cite("torchtune", "modules/loss/ce_chunked_output_loss.py, forward")

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the list of chunks; the recipe deletes it before backward."""
        return logits

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss.

        Shapes:
            labels by chunk         [b, s]       8 bytes
            logits of all chunks    [b, s, V]    width of the head
            one chunk in fp32       [b, s/8, V]  4 bytes
            log-softmax, of each    [b, s/8, V]  4 bytes, saved

        Source: torchtune, modules/loss/ce_chunked_output_loss.py, forward.
        """
        tape = logits.tape
        assert isinstance(logits, Chunks)
        targets = tape.new("labels by chunk", labels.shape, DType.INT64, self.source)
        total: Tensor | None = None
        for chunk in logits.parts:
            loss = ops.nll_loss(ops.log_softmax(ops.cast(chunk, F32, "chunk in fp32")), targets)
            total = loss if total is None else ops.add(total, loss, "sum of losses")
        assert total is not None
        return ops.scale(total, "mean loss")


def read(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the specification that torchtune 0.6 has for a model of transformers."""
    return _read(config, where, Decoder())


def read_middle(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the specification that torchtune 0.3 has for a model of transformers."""
    _refuse_later(config, where)
    return _read(config, where, MiddleDecoder())


def read_early(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the specification that torchtune 0.1 has for a model of transformers."""
    _refuse_later(config, where)
    return _read(config, where, EarlyDecoder())


def _refuse_later(config: Mapping[str, Any], where: str) -> None:
    """Refuse what is described for version 0.6 only.

    Raises:
        UnsupportedModelError: a tied head, or scaled rotary positions.
    """
    if config.get("tie_word_embeddings") or _is_scaled(config):
        raise UnsupportedModelError(
            f"{where}: a tied head or scaled rotary positions are described here for torchtune 0.6 "
            "only; use that version"
        )


def _read(given: Mapping[str, Any], where: str, family: Decoder) -> ModelSpec:
    """Return the specification of a Llama or Mistral model.

    Raises:
        UnsupportedModelError: torchtune's model is not described here for this family.
        InvalidConfigError: a field is missing or out of range.

    Source: torchtune, models/llama2/_component_builders.py and those of its neighbours.
    """
    model_type = str(given.get("model_type"))
    if model_type not in _FAMILIES or given.get("attention_bias") or given.get("mlp_bias"):
        raise UnsupportedModelError(
            f"{where}: torchtune's model is described here for llama and mistral without biases, "
            f"not for {model_type!r}"
        )
    config = Config(given)
    hidden, vocab = dim("h", config.count("hidden_size")), dim("V", config.count("vocab_size"))
    heads = config.heads()
    longest = config.count("max_position_embeddings")
    layers = config.count("num_hidden_layers")
    return ModelSpec(
        model_type=model_type,
        family=family,
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="tok_embeddings", rows=vocab, width=hidden),),
        kinds=(_layer(hidden, dim("f", config.count("intermediate_size")), heads),),
        pattern=(0,) * layers,
        final=(Norm(name="norm", width=hidden),),
        head=Linear(name="output", fan_in=hidden, fan_out=vocab),
        tied=config.flag("tie_word_embeddings", False),
        buffers=rotary_buffers(longest, heads.width.value, layers),
        max_positions=longest,
        supports_flash=False,
        trainers_batch=False,
        scaled_positions=_is_scaled(given),
        notes=config.notes,
    )


def _is_scaled(config: Mapping[str, Any]) -> bool:
    """Whether this is Llama 3.1 or later, whose rotary positions are stretched to 131072.

    A configuration may come without its `rope_scaling`; the earlier ones have 8192 at most.
    """
    positions = config.get("max_position_embeddings")
    stretched = isinstance(positions, int) and positions >= _STRETCHED
    return config.get("model_type") == "llama" and (bool(config.get("rope_scaling")) or stretched)


def rotary_buffers(longest: int, width: int, copies: int) -> tuple[Buffer, ...]:
    """Return the fp32 tables of all positions that a model allows, for each of its layers.

    Shapes:
        cache  [longest, d/2, 2]  4 bytes
        theta  [d/2]              4 bytes

    Source: torchtune, modules/position_embeddings.py, RotaryPositionalEmbeddings.build_rope_cache.
    """
    half = dim("d/2", width // 2)
    shapes: tuple[tuple[str, Shape], ...] = (
        ("cache", (dim("positions", longest), half, _PAIR)),
        ("theta", (half,)),
    )
    return tuple(
        Buffer(f"pos_embeddings.{name}", shape, F32)
        for _ in range(copies)
        for name, shape in shapes
    )


def _layer(hidden: Dim, ffn: Dim, heads: Heads) -> LayerKind:
    query = dim("H·d", heads.query.value * heads.width.value)
    shared = dim("KV·d", heads.key_value.value * heads.width.value)
    table = (SEQ, dim("d/2", heads.width.value // 2))
    return LayerKind(
        name="layer",
        modules=(
            Linear(name="q_proj", fan_in=hidden, fan_out=query),
            Linear(name="k_proj", fan_in=hidden, fan_out=shared),
            Linear(name="v_proj", fan_in=hidden, fan_out=shared),
            Linear(name="output_proj", fan_in=query, fan_out=hidden),
            Linear(name="w1", fan_in=hidden, fan_out=ffn),
            Linear(name="w2", fan_in=ffn, fan_out=hidden),
            Linear(name="w3", fan_in=hidden, fan_out=ffn),
            Norm(name="sa_norm", width=hidden),
            Norm(name="mlp_norm", width=hidden),
        ),
        heads=heads,
        facts={"table": Weight("table", table, F32, False)},
    )
