"""Prefix tuning: trained keys and values that lie in the cache of every layer before the text's."""

from typing import Annotated, Any, ClassVar, Final

from msgspec import Meta
from msgspec.structs import replace

from estimator.dtypes import DType
from estimator.eager import ops
from estimator.eager.size import BATCH, SECOND, Dim, dim
from estimator.eager.tensor import Node, Tensor
from estimator.errors import UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.spec import ModelSpec, VirtualTokens, Weight
from estimator.run import Run
from estimator.section import Count
from estimator.sources import Cite
from estimator.techniques.method import Method, frozen
from estimator.techniques.methods.prompt_tuning import CALL, ENCODER

_PROMPT: Final = Cite("peft", "peft_model.py, PeftModel.get_prompt")
_CACHE: Final = Cite("hf-library", "cache_utils.py, DynamicLayer.update")
_MODEL: Final = Cite("peft", "tuners/prefix_tuning/model.py, PrefixEncoder")


class Prefix(VirtualTokens, frozen=True, eq=False, kw_only=True):
    """Keys and values of virtual tokens for every layer.

    Args:
        tokens: how many.
        heads: key and value heads of a layer.
        head_width: width of one head.
        layers: of the model.
        inner: width of the projection that makes them; None where the table holds them itself.
    """

    tokens: Dim
    heads: Dim
    head_width: Dim
    layers: Dim
    inner: Dim | None

    @property
    def _token(self) -> Dim:
        return dim("KV·d", self.heads.value * self.head_width.value)

    @property
    def _all(self) -> Dim:
        return dim("2·L·KV·d", 2 * self.layers.value * self._token.value)

    def weights(self) -> tuple[Weight, ...]:
        """Return the table, and the projection if there is one; fp32 whatever the model is.

        Shapes:
            embedding                    [P, 2·L·KV·d]              4 bytes
            with prefix_projection:
            embedding                    [P, KV·d]                  4 bytes
            transform.0                  [e, KV·d] + [e]            4 bytes
            transform.2                  [2·L·KV·d, e] + [2·L·KV·d] 4 bytes

        Source: li2021, section 4.2 and 4.3; peft, tuners/prefix_tuning/model.py, PrefixEncoder.
        """
        if self.inner is None:
            return (_weight("embedding.weight", self.tokens, self._all),)
        return (
            _weight("embedding.weight", self.tokens, self._token),
            _weight("transform.0.weight", self.inner, self._token),
            _weight("transform.0.bias", self.inner),
            _weight("transform.2.weight", self._all, self.inner),
            _weight("transform.2.bias", self._all),
        )

    def prepare(self, run: Forward, layers: int) -> None:
        """Make the keys and values of every layer and put copies of them into the cache.

        Shapes:
            mask of all tokens          [b, t]            4 bytes; t is the prefix and the text
            keys and values             [b, P, 2·L·KV·d]  4 bytes, then the width of the model
            in each layer's cache, two  [b, KV, P, d]     width of the model

        Source: peft, peft_model.py, PeftModel.get_prompt; hf-library, cache_utils.py,
        DynamicCache.__init__ and DynamicLayer.update.
        """
        tape = run.tape
        for name, shape in (
            ("mask of the virtual tokens", (BATCH, self.tokens)),
            ("mask of all tokens", (BATCH, SECOND)),
        ):
            run.caller_names[name] = tape.new(name, shape, DType.FLOAT32, CALL)
        with tape.module(ENCODER):
            past = ops.cast(self._encoded(run), run.dtype)
            self._into_cache(run, past, layers)

    def _encoded(self, run: Forward) -> Tensor:
        """Look the prefix up for every row; with a projection, make it of narrower rows."""
        ids = run.tape.new("prompt_tokens", (BATCH, self.tokens), DType.INT64, CALL)
        params = [run.param(ENCODER, each) for each in self.weights()]
        if self.inner is None:
            return ops.embedding(ids, params[0], self._all)
        x = ops.embedding(ids, params[0], self._token)
        with run.tape.module("transform.0"):
            x = ops.linear(x, params[1], params[2], self.inner)
        x = ops.tanh(x)
        with run.tape.module("transform.2"):
            return ops.linear(x, params[3], params[4], self._all)

    def _into_cache(self, run: Forward, past: Tensor, layers: int) -> None:
        """Copy each layer's part; all of it is one node whose backward runs after every layer's.

        Backward stacks the two gradients of a layer, which until then are views of the gradients of
        the layer's whole keys and values, puts the layers together, and orders them as the table.

        Source: peft, peft_model.py, PeftModel.get_prompt, in the order of its backward;
        hf-library, cache_utils.py, DynamicLayer.update.
        """
        tape, shape = run.tape, (BATCH, self.heads, self.tokens, self.head_width)
        outputs = []
        for site in range(1, layers + 1):
            outputs += [
                tape.new(f"{name} in the cache", shape, past.dtype, _CACHE, site=site)
                for name in ("keys", "values")
            ]
            run.prefixes[site] = outputs[-2:]
        both, whole = (dim("2", 2), *shape), (dim("2·L", 2 * self.layers.value), *shape)
        rows = (BATCH, self.tokens, self._all)

        def rule(node: Node, grads: list[Tensor | None], saved: list[Any]) -> tuple[Tensor]:
            tape, stacked, dtype = node.tape, [], node.meta_of(0)[1]
            name = f"{node.name}, backward"
            for layer in reversed(range(layers)):
                stacked.append(tape.new(f"{name}: stack", both, dtype, _PROMPT, site=layer + 1))
                grads[2 * layer] = grads[2 * layer + 1] = None
            joined = [tape.new(f"{name}: all layers", whole, dtype, _PROMPT)]
            stacked.clear()
            ordered = tape.new(f"{name}: by token", rows, dtype, _PROMPT)
            joined.clear()
            return (ordered,)

        tape.record("prefix", (past,), (), rule, *outputs)


def _weight(name: str, *shape: Dim) -> Weight:
    return Weight(name, shape, DType.FLOAT32, True, source=_MODEL)


class PrefixTuning(Method, frozen=True, tag="prefix_tuning"):
    """Train keys and values before those of the text in every layer (PEFT's PrefixTuningConfig)."""

    peft: ClassVar[str | None] = "PrefixTuningConfig"
    source: ClassVar[Cite] = Cite("li2021", "section 4.2, equation 3")

    num_virtual_tokens: Annotated[
        int, Meta(ge=1, le=65_536, description="virtual tokens before the text")
    ] = 20
    prefix_projection: bool = False
    encoder_hidden_size: Count | None = None

    def apply(self, run: Run) -> Run:
        """Return the run with every weight frozen and a prefix in the cache of every layer.

        Raises:
            UnsupportedCombinationError: a model whose cache PEFT's prefix does not fit.
        """
        spec = frozen(run.spec)
        heads = _shared_heads(spec)
        width = dim("KV·d", heads[0].value * heads[1].value)
        inner = None
        if self.prefix_projection:
            given = self.encoder_hidden_size
            inner = width if given is None else dim("e", given)
        prefix = Prefix(
            name=ENCODER,
            tokens=dim("P", self.num_virtual_tokens),
            heads=heads[0],
            head_width=heads[1],
            layers=dim("L", len(spec.pattern)),
            inner=inner,
        )
        spec = replace(spec, embeddings=(*spec.embeddings, prefix))
        return replace(run, spec=spec, prefix_tokens=self.num_virtual_tokens)


# Model classes that were run with a prefix; others keep keys otherwise, or take no cache.
_KNOWN: Final = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi3"})


def _shared_heads(spec: ModelSpec) -> tuple[Dim, Dim]:
    """Return the key heads and their width, which PEFT takes to be the same in all layers.

    Source: peft, utils/other.py, _prepare_prompt_learning_config.
    """
    found = {(kind.heads.key_value, kind.heads.width) for kind in spec.kinds}
    if spec.model_type not in _KNOWN or len(found) > 1:
        raise UnsupportedCombinationError(
            f"prefix_tuning has no sourced answer for {spec.model_type} models; use prompt_tuning, "
            f"or one of {', '.join(sorted(_KNOWN))}"
        )
    return found.pop()
