"""LLaMA-Adapter as Lit-GPT runs it: prompts in attention (v1), scales and biases too (v2)."""

from typing import Annotated, Any, ClassVar

from msgspec import Meta, Struct
from msgspec.structs import replace

from estimator.eager import ops
from estimator.eager.size import BATCH, dim
from estimator.eager.tensor import Node, Param, Tensor, view
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.forward import Forward
from estimator.model.litgpt import CHUNK, GATE, PROMPT, Gate, Gpt, Grads, beside, chunks
from estimator.model.spec import Embedding, LayerKind, Linear, ModelSpec, Module, Norm, Weight
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.method import Method


class ScaleAndBias(Struct, frozen=True):
    """What version 2 puts behind a linear layer: `scale * (linear(x) + bias)`."""

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the two vectors.

        Shapes:
            adapter_bias, adapter_scale  [out]

        Source: litgpt, lit_gpt/adapter_v2.py, AdapterV2Linear.
        """
        source = Cite("litgpt", "lit_gpt/adapter_v2.py, AdapterV2Linear")
        dtype = linear.dtype
        return tuple(
            Weight(name, (linear.fan_out,), dtype, True, source=source)
            for name in ("adapter_bias", "adapter_scale")
        )

    def forward(self, run: Forward, linear: Linear, x: Tensor) -> Tensor:
        """Return the scaled output; the sum is saved for the scale's gradient.

        Source: litgpt, lit_gpt/adapter_v2.py, AdapterV2Linear.forward.
        """
        bias, scale = (run.param(linear.name, each) for each in self.weights(linear))
        if linear.name == run.spec.head.name:
            return self._over_chunks(run, linear, x, bias, scale)
        return ops.mul(scale, ops.add(run.base_linear(x, linear), bias, "with adapter_bias"))

    def _over_chunks(
        self, run: Forward, linear: Linear, x: Tensor, bias: Param, scale: Param
    ) -> Tensor:
        """Do the same behind the head, whose gradients come chunk by chunk."""
        tape, dtype, source = run.tape, x.dtype, self.weights(linear)[0].source
        product = view(run.base_linear(x, linear), (BATCH, CHUNK, linear.fan_out))
        total = chunks(tape, "with adapter_bias", linear.fan_out, dtype, source)
        tape.record(
            "add", (product, bias), (), lambda node, grads, saved: (grads[0], grads[0]), total
        )
        out = chunks(tape, "scaled", linear.fan_out, dtype, source)

        def rule(node: Node, grads: Grads, saved: list[Any]) -> tuple[Tensor | None, ...]:
            into_scale = node.new_grad(1)
            (kept,) = saved
            return beside(node.new_grad(0), beside(kept, grads[0])), into_scale

        tape.record("mul", (total, scale), (total,), rule, out)
        return out


class LlamaAdapter(Method, frozen=True, tag="llama_adapter"):
    """Prompts of learned tokens in the attention of the upper layers (LLaMA-Adapter, litgpt)."""

    source: ClassVar[Cite] = Cite("zhang2023adapter", "section 3")

    adapter_prompt_length: Annotated[
        int, Meta(ge=1, le=4096, description="Learned tokens of each layer.")
    ] = 10
    adapter_start_layer: Annotated[
        int, Meta(ge=0, le=2048, description="First layer that has a prompt.")
    ] = 2

    def apply(self, run: Run) -> Run:
        """Freeze the model and put a prompt into each layer from the first one on.

        Raises:
            UnsupportedCombinationError: the model is not Lit-GPT's.
            InvalidRequestError: no layer would have a prompt.
        """
        return replace(run, spec=self._prompted(run.spec))

    def _prompted(self, spec: ModelSpec) -> ModelSpec:
        if not isinstance(spec.family, Gpt):
            raise UnsupportedCombinationError(
                f"method {self.name!r} is answered for software litgpt alone; PEFT's own is "
                "'adaption_prompt'"
            )
        layers, start = len(spec.pattern), self.adapter_start_layer
        if start >= layers:
            raise InvalidRequestError(
                f"adapter_start_layer {start} is beyond the {layers} layers of the model"
            )
        spec = spec.map_modules(lambda module: replace(module, trainable=False))
        (plain,) = spec.kinds
        # The lowest prompt stands apart: nothing below it wants a gradient.
        kinds = (
            plain,
            self._with_prompt(plain, "first layer with a prompt"),
            self._with_prompt(plain, "layer with a prompt"),
        )
        pattern = tuple(0 if each < start else 1 if each == start else 2 for each in range(layers))
        used = tuple(dict.fromkeys(pattern))
        return replace(
            spec,
            kinds=tuple(kinds[each] for each in used),
            pattern=tuple(used.index(each) for each in pattern),
        )

    def _with_prompt(self, kind: LayerKind, name: str) -> LayerKind:
        rows = dim("prompt", self.adapter_prompt_length)
        width = next(each for each in kind.modules if isinstance(each, Norm)).width
        # Modules are copied, so that each kind counts its own.
        modules: tuple[Module, ...] = tuple(replace(each) for each in kind.modules)
        added = (
            Embedding(name=PROMPT, rows=rows, width=width),
            Gate(name=GATE, heads=kind.heads.query),
        )
        return replace(kind, name=name, modules=(*modules, *added))


class LlamaAdapterV2(LlamaAdapter, frozen=True, tag="llama_adapter_v2"):
    """Prompts, and a scale and a bias behind every linear layer; norms are trained."""

    source: ClassVar[Cite] = Cite("gao2023adapter", "section 3.2")

    def apply(self, run: Run) -> Run:
        """Freeze all but the norms, and add prompts, scales and biases."""

        def adapt(module: Module) -> Module:
            if isinstance(module, Linear):
                return replace(module, adapter=ScaleAndBias())
            return replace(module, trainable=True) if isinstance(module, Norm) else module

        return replace(run, spec=self._prompted(run.spec).map_modules(adapt))
