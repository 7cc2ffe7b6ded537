"""Lit-GPT's own model, `lit_gpt/model.py` and `lit_gpt/lora.py` of October 2023: one class for all.

Read from the same `config.json` as transformers' models. Queries, keys and values come from one
projection; in training every tensor has the width of the run, rotary positions are applied in fp32,
and the head runs over 128 tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from estimator.dtypes import DType
from estimator.eager import attention, ops
from estimator.eager.size import BATCH, SEQ, Dim, dim
from estimator.eager.tensor import Edge, Node, Tape, Tensor, view
from estimator.errors import UnsupportedModelError
from estimator.model.config import Config
from estimator.model.forward import Forward, activate, rotate_half
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Module, Norm, Weight
from estimator.sources import Cite
from estimator.units import round_up

QKV: Final = "attn.attn"
PROMPT: Final = "attn.adapter_wte"
GATE: Final = "attn.gating_factor"
CHUNK: Final = dim("128", 128)
_OUTPUT: Final = Cite("lightning", "fabric/plugins/precision/half.py, convert_output")
_PROMPT: Final = Cite("litgpt", "lit_gpt/adapter.py, CausalSelfAttention")
_LOSS: Final = Cite("litgpt", "lit_gpt/utils.py, chunked_cross_entropy")
_LORA: Final = Cite("litgpt", "lit_gpt/lora.py, LoRAQKVLinear.forward")
Grads = list["Tensor | None"]
_MULTIPLE: Final = {"gpt_neox": 512, "llama": 64}


class Gate(Module, frozen=True, eq=False, kw_only=True):
    """The learned weight of each head's attention over the prompt."""

    heads: Dim

    def weights(self) -> tuple[Weight, ...]:
        return (Weight("weight", (self.heads,), self.dtype, self.trainable),)


class Gpt:
    """The forward pass of `GPT`."""

    def embed(self, run: Forward, ids: Tensor) -> Tensor:
        """Look the tokens up; the rotary tables are buffers of the model."""
        return run.embedding(ids, "wte")

    def layer(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Run attention and MLP, one behind the other or side by side.

        Source: litgpt, lit_gpt/model.py, Block.forward.
        """
        n_1 = self._norm(run, kind, x, "norm_1")
        h = self.attention(run, kind, n_1)
        if kind.facts["parallel"]:
            n_2 = n_1 if kind.facts["shared_norm"] else self._norm(run, kind, x, "norm_2")
            return ops.add(ops.add(self.mlp(run, kind, n_2), h), x, "residual")
        x = ops.add(h, x, "residual")
        return ops.add(self.mlp(run, kind, self._norm(run, kind, x, "norm_2")), x, "residual")

    def _norm(self, run: Forward, kind: LayerKind, x: Tensor, name: str) -> Tensor:
        if not kind.facts["rms"]:
            return run.layer_norm(x, name)
        return rms_norm(run, x, name)

    def attention(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Project to queries, keys and values at once, rotate, attend, project.

        Values stay a view of the projection, which FlashAttention therefore keeps as a whole.

        Source: litgpt, lit_gpt/model.py, CausalSelfAttention.forward.
        """
        heads = kind.heads
        qkv = fused_qkv(run, x)
        query = (BATCH, heads.query, SEQ, heads.width)
        q, k, v = ops.split_last(qkv, (kind.facts["H·d"],) * 3)
        q, k, v = (view(each, query) for each in (q, k, v))
        q_roped = _rope(run, kind, q)
        k_roped = _rope(run, kind, k)
        q = ops.cat_last((q_roped, _rest(kind, q)), heads.width)
        k = ops.cat_last((k_roped, _rest(kind, k)), heads.width)
        y = attention.flash(q, k, v, heads)
        if run.has(PROMPT):
            y = ops.add(y, self._prompt(run, kind, q), "sum with attention over the prompt")
        # The kernel's output lies head by head, as its query does, so this reshape is a copy.
        y = ops.copy(y, (BATCH, SEQ, kind.facts["H·d"]), "output by token")
        return run.linear(y, "attn.proj")

    def _prompt(self, run: Forward, kind: LayerKind, q: Tensor) -> Tensor:
        """Attend to the learned prompt behind a mask of ones, and weigh what comes back.

        Shapes:
            prompt, its q, k and v  [prompt, h], [prompt, 3·h]
            mask                    [s, prompt]  1 byte, and once more in the query's type
            output                  [b, s, h]    saved, for the weight's gradient too

        Source: litgpt, lit_gpt/adapter.py, CausalSelfAttention.scaled_dot_product_attention.
        """
        prompt = run.modules[PROMPT]
        assert isinstance(prompt, Embedding)
        tape, heads = run.tape, kind.heads
        weight = run.param(PROMPT, prompt.weights()[0])
        held = Tensor(tape, weight.shape, weight.dtype, None, Edge(weight))
        qkv = run.base_linear(held, _linear(run, QKV))
        head = (heads.query, prompt.rows, heads.width)
        _, k, v = (view(each, head) for each in ops.split_last(qkv, (kind.facts["H·d"],) * 3))
        tape.new("mask of the prompt", (SEQ, prompt.rows), DType.BOOL, _PROMPT)
        mask = tape.new("mask of the prompt", (SEQ, prompt.rows), q.dtype, _PROMPT)
        out = tape.new("attention over the prompt", q.shape, q.dtype, _PROMPT)
        lse = tape.new("log-sum-exp", (BATCH, heads.query, SEQ), DType.FLOAT32, _PROMPT)

        def rule(node: Node, grads: Grads, saved: list[Any]) -> tuple[Tensor | None, ...]:
            return tuple(node.new_grad(each) if node.wants(each) else None for each in range(3))

        tape.record("attention over the prompt", (q, k, v), (q, k, v, mask, out, lse), rule, out)
        gate = run.param(GATE, run.modules[GATE].weights()[0])
        return ops.mul(gate, out, "weighed attention over the prompt")

    def mlp(self, run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
        """Run the gated or the plain MLP.

        Source: litgpt, lit_gpt/model.py, LLaMAMLP.forward and GptNeoxMLP.forward.
        """
        if not kind.facts["gated"]:
            x = run.linear(x, "mlp.fc")
            x = ops.gelu(x)
            return run.linear(x, "mlp.proj")
        x_fc_1 = run.linear(x, "mlp.fc_1")
        x_fc_2 = run.linear(x, "mlp.fc_2")
        x = ops.mul(activate(x_fc_1, "silu"), x_fc_2, "gated product")
        return run.linear(x, "mlp.proj")

    def final(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the last norm."""
        return self._norm(run, run.spec.kinds[0], hidden, "ln_f")

    def logits(self, run: Forward, hidden: Tensor) -> Tensor:
        """Run the head over 128 tokens at a time and cast what it returns to fp32.

        Source: litgpt, lit_gpt/lora.py, GPT.forward with lm_head_chunk_size=128; lightning,
        fabric/plugins/precision/half.py, HalfPrecision.convert_output.
        """
        logits = run.linear(hidden, "lm_head")
        chunk = view(logits, (BATCH, CHUNK, run.spec.vocab))
        out = chunks(run.tape, "logits in fp32", run.spec.vocab, DType.FLOAT32, _OUTPUT)

        def rule(node: Node, grads: Grads, saved: list[Any]) -> tuple[Tensor | None]:
            return (beside(node.new_grad(0), grads[0]),)

        run.tape.record("logits in fp32", (chunk,), (), rule, out)
        return out


def chunks(tape: Tape, name: str, vocab: Dim, dtype: DType, source: Cite) -> Tensor:
    """Return a tensor with the memory of all chunks of a sequence and the shape of one.

    The list of chunks lives as a whole, and the gradients flow back chunk by chunk.
    """
    whole = tape.new(name, (BATCH, SEQ, vocab), dtype, source)
    return Tensor(tape, (BATCH, CHUNK, vocab), dtype, whole.storage)


def beside(grad: Tensor, other: Tensor | None) -> Tensor:
    """Keep alive beside a gradient of the first chunk what the later chunks still need."""
    return Tensor(grad.tape, grad.shape, grad.dtype, grad.storage, base=other)


class ChunkedLoss:
    """Cross entropy over the list of chunks, in fp32.

    Source: litgpt, lit_gpt/utils.py, chunked_cross_entropy.
    """

    def rows(self, spec: ModelSpec, tokens: int) -> None:
        """Return None: the chunks of all tokens exist at once."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the logits that the loop holds."""
        return logits

    def __call__(self, logits: Tensor, labels: Tensor, vocab: Dim) -> Tensor:
        """Return the loss.

        Shapes:
            log-softmax  [b, s, V]    4 bytes, saved
            gradients    [b, 128, V]  4 bytes, two at a time
        """
        tape = logits.tape
        log_probs = chunks(tape, "log_softmax", vocab, DType.FLOAT32, _LOSS)

        def rule(node: Node, grads: Grads, saved: list[Any]) -> tuple[Tensor | None]:
            return (beside(node.new_grad(0), saved[0]),)

        tape.record("log_softmax", (logits,), (log_probs,), rule, log_probs)
        return ops.nll_loss(log_probs, labels)


def _linear(run: Forward, name: str) -> Linear:
    module = run.modules[name]
    assert isinstance(module, Linear)
    return module


def rms_norm(run: Forward, x: Tensor, name: str) -> Tensor:
    """RMSNorm in fp32 up to the product with the weight.

    Source: litgpt, lit_gpt/rmsnorm.py, RMSNorm.forward.
    """
    with run.tape.module(name):
        dtype = x.dtype
        x = ops.cast(x, DType.FLOAT32)
        norm_x = ops.mean_last(ops.mul(x, x, "square"))
        x_normed = ops.mul(x, ops.rsqrt(ops.shift(norm_x)), "normalized")
        return ops.cast(ops.mul(run.norm_weight(name), x_normed, "weighted"), dtype)


def fused_qkv(run: Forward, x: Tensor) -> Tensor:
    """Return the projection to queries, keys and values, with adapters on queries and values.

    Shapes:
        after_B                    [b, 2·h, s]
        copy of it by token        [s·b, 2·h]   saved by index_copy
        update among zeros, twice  [s, b, 3·h]
        columns                    [2·h]        8 bytes, saved

    Source: litgpt, lit_gpt/lora.py, LoRAQKVLinear.forward and zero_pad.
    """
    module = _linear(run, QKV)
    adapter: Any = module.adapter
    if not hasattr(adapter, "r"):
        return run.linear(x, QKV)
    rank, dropout = adapter.r, adapter.dropout
    down, up = adapter.weights(module)
    tape, wide = run.tape, dim("2·h", 2 * module.fan_in.value)
    with tape.module(QKV):
        pretrained = run.base_linear(x, module)
        after_a = ops.linear(
            ops.dropout(x, dropout), run.param(QKV, down), None, dim("2·r", 2 * rank)
        )
        after_b = ops.linear(after_a, run.param(QKV, up), None, wide)
        lora = ops.scale(_padded(after_b, module.fan_out), "scaled update")
        return ops.add(pretrained, lora, "sum with the update")


def _padded(x: Tensor, width: Dim) -> Tensor:
    tape = x.tape
    source = ops.copy(x, name="update by token")
    zeros = tape.new("zeros", (*x.shape[:-1], width), x.dtype, _LORA)
    columns = tape.new("columns", (x.shape[-1],), DType.INT64, _LORA)
    out = tape.new("update among zeros", zeros.shape, x.dtype, _LORA)

    def rule(node: Node, grads: Grads, saved: list[Any]) -> tuple[Tensor | None]:
        return (node.new_grad(0, source=_LORA),)

    tape.record("index_copy", (source,), (source, columns), rule, out)
    return out


def _rope(run: Forward, kind: LayerKind, x: Tensor) -> Tensor:
    """Turn the first dimensions of each head, in fp32 because the tables are.

    Source: litgpt, lit_gpt/model.py, apply_rope.
    """
    x = ops.narrow(x, kind.facts["rotary"])
    rotated = rotate_half(x)
    table = run.param("rope", kind.facts["table"])
    roped = ops.add(ops.mul(x, table, "times cos"), ops.mul(rotated, table, "times sin"))
    return ops.cast(roped, x.dtype)


def _rest(kind: LayerKind, x: Tensor) -> Tensor:
    return ops.narrow(x, kind.facts["rest"])


def read(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the specification that Lit-GPT has for a model of transformers.

    Raises:
        UnsupportedModelError: Lit-GPT's model is not described here for this family.
        InvalidConfigError: a field is missing or out of range.

    Source: litgpt, lit_gpt/config.py.
    """
    kind_of = str(config.get("model_type"))
    if kind_of not in ("llama", "gpt_neox", "phi"):
        raise UnsupportedModelError(
            f"{where}: litgpt's model is described here for llama, gpt_neox and phi, "
            f"not for {kind_of!r}"
        )
    values = Config(config)
    hidden = dim("h", values.count("hidden_size"))
    heads = values.heads()
    if heads.groups > 1:
        raise UnsupportedModelError(
            f"{where}: litgpt's model with grouped heads is not described here yet"
        )
    llama = kind_of == "llama"
    fraction = {"llama": 1.0, "gpt_neox": 0.25, "phi": 0.5}[kind_of]
    fields = {"gpt_neox": "rotary_pct", "phi": "partial_rotary_factor"}
    if kind_of in fields:
        fraction = values.rotary_fraction(fields[kind_of], fraction)
    rotary = int(heads.width.value * fraction)
    ffn = dim("f", values.count("intermediate_size"))
    width = dim("H·d", heads.query.value * heads.width.value)
    fused = dim("3·H·d", 3 * width.value)
    biased = not llama
    norm_2 = () if kind_of == "phi" else (Norm(name="norm_2", width=hidden, bias=biased),)
    mlp = (
        (
            Linear(name="mlp.fc_1", fan_in=hidden, fan_out=ffn),
            Linear(name="mlp.fc_2", fan_in=hidden, fan_out=ffn),
        )
        if llama
        else (Linear(name="mlp.fc", fan_in=hidden, fan_out=ffn, bias=True),)
    )
    table = (SEQ, dim("rotary", rotary))
    vocab = dim("V", round_up(values.count("vocab_size"), _MULTIPLE.get(kind_of, 1)))
    kind = LayerKind(
        name="layer",
        modules=(
            Norm(name="norm_1", width=hidden, bias=biased),
            Linear(name=QKV, fan_in=hidden, fan_out=fused, bias=biased),
            Linear(name="attn.proj", fan_in=width, fan_out=hidden, bias=biased),
            *norm_2,
            *mlp,
            Linear(name="mlp.proj", fan_in=ffn, fan_out=hidden, bias=biased),
        ),
        heads=attention.heads(heads.query.value, heads.key_value.value, heads.width.value),
        facts={
            "parallel": not llama,
            "shared_norm": kind_of == "phi",
            "rms": llama,
            "gated": llama,
            "rotary": dim("rotary", rotary),
            "rest": dim("d-rotary", heads.width.value - rotary),
            "H·d": width,
            "table": Weight("table", table, DType.FLOAT32, False),
        },
    )
    return ModelSpec(
        model_type=kind_of,
        family=Gpt(),
        hidden=hidden,
        vocab=vocab,
        embeddings=(Embedding(name="wte", rows=vocab, width=hidden),),
        kinds=(kind,),
        pattern=(0,) * values.count("num_hidden_layers"),
        final=(Norm(name="ln_f", width=hidden, bias=biased),),
        head=Linear(name="lm_head", fan_in=hidden, fan_out=vocab, bias=kind_of == "phi"),
        tied=False,
        buffers=(),
        supports_flash=False,
        notes=values.notes,
    )
