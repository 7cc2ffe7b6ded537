"""LLaMA-Adapter as PEFT runs it: learned tokens that the upper layers attend to, behind a gate."""

from typing import Annotated, ClassVar, Final

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import BATCH, ONE, SEQ, Dim, dim
from estimator.eager.tensor import Edge, Param, Tensor, view
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import Forward, rotated
from estimator.model.spec import LayerKind, ModelSpec, Module, Weight
from estimator.run import Run
from estimator.section import Count
from estimator.sources import Cite
from estimator.techniques.method import Method, by_layer, frozen

_LAYER: Final = Cite("peft", "tuners/adaption_prompt/layer.py, _BaseAdaptedAttention.__init__")
NAME: Final = "adaption"
ROTARY: Final = ("llama", "mistral")
KNOWN: Final = (*ROTARY, "gpt2")


class AdaptionPrompt(Module, frozen=True, eq=False, kw_only=True):
    """The learned tokens and the gate of one layer.

    Args:
        tokens: how many.
        width: of the hidden states.
    """

    tokens: Dim
    width: Dim

    def weights(self) -> tuple[Weight, ...]:
        """Return tokens and gate, in the type of the layer.

        Shapes:
            adaption_prompt  [1, K, h]
            adaption_gate    [1]

        Source: peft, tuners/adaption_prompt/layer.py, _BaseAdaptedAttention.__init__.
        """
        return (
            Weight(
                "adaption_prompt", (ONE, self.tokens, self.width), self.dtype, True, source=_LAYER
            ),
            Weight("adaption_gate", (ONE,), self.dtype, True, source=_LAYER),
        )

    def prompted(self, run: Forward, kind: LayerKind, hidden: Tensor, output: Tensor) -> Tensor:
        """Return attention's output with what the queries find among the learned tokens.

        The queries are made a second time, and the values too though nobody reads them.

        Shapes:
            queries, rotated     [b, s, H·d]   made again, like the values
            keys, values         [b, H, K, d]  of the learned tokens, written out for every row
            scores               [b, H, s, K]  fp32 softmax and its cast saved
            what is found        [b, s, h]     once by head, once by token, and projected

        Source: peft, tuners/adaption_prompt/layer.py, AdaptedAttention.forward and
        AdaptedAttentionGPT.forward; tuners/adaption_prompt/utils.py, llama_compute_query_states
        and gpt2_compute_query_states.
        """
        first, second = (run.param(self.name, each) for each in self.weights())
        is_rotary = run.has("self_attn.q_proj")
        keys, values = self._tokens_of(run, kind, first, is_rotary)
        queries = self._queries(run, kind, hidden, is_rotary)
        previous = queries.dtype
        shape = (BATCH, kind.heads.query, SEQ, self.tokens)
        scores = ops.scale(ops.matmul(queries, keys, shape, "scores of the prompt"))
        weights = ops.cast(ops.softmax(scores, DType.FLOAT32), previous)
        scores = ops.mul(second, weights, "gated weights")
        del weights
        found = self._found(kind, scores, values)
        if is_rotary:
            found = run.linear(found, "self_attn.o_proj")
        return ops.cast(ops.add(output, found, "sum with the prompt"), previous)

    def _found(self, kind: LayerKind, scores: Tensor, values: Tensor) -> Tensor:
        heads = kind.heads
        by_head = (BATCH, heads.query, SEQ, heads.width)
        by_token = (BATCH, SEQ, heads.query, heads.width)
        out = ops.copy(ops.matmul(scores, values, by_head, "prompt output"), by_token, "by token")
        return view(out, (BATCH, SEQ, dim("H·d", heads.query.value * heads.width.value)))

    def _queries(self, run: Forward, kind: LayerKind, hidden: Tensor, is_rotary: bool) -> Tensor:
        heads = (BATCH, SEQ, kind.heads.query, kind.heads.width)
        if not is_rotary:
            query, _, _ = ops.split_last(run.linear(hidden, "attn.c_attn"), (self.width,) * 3)
            return view(query, heads)
        query = view(run.linear(hidden, "self_attn.q_proj"), heads)
        unused = run.linear(hidden, "self_attn.v_proj")
        out = rotated(query, *run.rotary["rotary"])
        del unused
        return out

    def _tokens_of(
        self, run: Forward, kind: LayerKind, param: Param, is_rotary: bool
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the learned tokens, [b, H, K, d]."""
        prompt = Tensor(run.tape, param.shape, param.dtype, None, edge=Edge(param))
        if is_rotary:
            pair = tuple(run.linear(prompt, f"self_attn.{name}_proj") for name in "kv")
        else:
            _, *rest = ops.split_last(run.linear(prompt, "attn.c_attn"), (self.width,) * 3)
            pair = tuple(rest)
        heads = kind.heads
        one = (ONE, self.tokens, heads.key_value, heads.width)
        every = (BATCH, *one[1:])
        out = (BATCH, heads.query, self.tokens, heads.width)
        keys, values = (
            ops.copy(ops.repeat(view(each, one), every, "a copy for each row"), out, "by head")
            for each in pair
        )
        return keys, values


class AdaptionPromptTuning(Method, frozen=True, tag="adaption_prompt"):
    """Train tokens in the attention of the upper layers (PEFT's AdaptionPromptConfig)."""

    peft: ClassVar[str | None] = "AdaptionPromptConfig"
    source: ClassVar[Cite] = Cite(
        "peft", "tuners/adaption_prompt/layer.py, AdaptedAttention.forward"
    )
    quantizations: ClassVar[frozenset[str] | None] = frozenset()

    adapter_len: Annotated[
        int, Meta(ge=1, le=65_536, description="Learned tokens of each layer.")
    ] = 10
    adapter_layers: Annotated[
        Count | None, Meta(description="Layers that have them, from the top; none: all.")
    ] = None

    @property
    def singles_out_layers(self) -> bool:
        """Whether only the upper layers have a prompt."""
        return self.adapter_layers is not None

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and a prompt in each of the upper layers.

        Raises:
            InvalidRequestError: more layers than the model has.
            UnsupportedCombinationError: a model that PEFT has no such attention for.

        Source: peft, tuners/adaption_prompt/model.py, AdaptionPromptModel.add_adapter;
        tuners/adaption_prompt/config.py, TRANSFORMERS_MODEL_CONFIG.
        """
        spec = frozen(run.spec)
        _refuse(spec)
        layers = len(spec.pattern)
        count = layers if self.adapter_layers is None else self.adapter_layers
        if count > layers:
            raise InvalidRequestError(
                f"adapter_layers {count} is more than the {layers} layers of the model"
            )
        prompt = AdaptionPrompt(name=NAME, tokens=dim("K", self.adapter_len), width=spec.hidden)

        def change(kind: LayerKind, chosen: bool) -> LayerKind:
            # Modules are copied, so that each kind counts its own.
            modules = tuple(replace(each) for each in kind.modules)
            return replace(kind, modules=(*modules, replace(prompt)) if chosen else modules)

        return replace(run, spec=by_layer(spec, lambda index: index >= layers - count, change))


def _refuse(spec: ModelSpec) -> None:
    if spec.model_type not in KNOWN:
        raise UnsupportedCombinationError(
            f"PEFT has no adaption_prompt for {spec.model_type} models, but for "
            f"{', '.join(KNOWN)}; use prefix_tuning or lora"
        )
    heads = spec.kinds[0].heads
    if heads.query.value * heads.width.value != spec.hidden.value:
        raise InvalidRequestError(
            "adaption_prompt counts key heads by the width of the hidden states, which is not that "
            "of the heads together in this model; use lora"
        )
