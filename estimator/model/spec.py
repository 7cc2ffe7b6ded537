"""What a model is made of: modules with their tensors, layer kinds, and how often each occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol

from msgspec import Struct
from msgspec.structs import astuple, replace

from estimator.dtypes import DType
from estimator.eager import attention
from estimator.eager.attention import Heads
from estimator.eager.size import Dim, Shape, elements
from estimator.eager.tensor import Param, Tensor
from estimator.sources import Cite


class Weight(Struct, frozen=True, eq=False):
    """One parameter tensor of a module, or one stored tensor that stands for it.

    Args:
        name: the tensor's name inside its module, such as `weight` or `lora_A.weight`.
        shape: dimensions, none of which is the micro-batch or the length.
        dtype: how it is stored.
        trainable: whether it gets a gradient.
        updated: whether the optimizer has it, if it gets one.
        stands_for: parameters it counts for; packed 4-bit weights stand for more than they hold.
    """

    name: str
    shape: Shape
    dtype: DType
    trainable: bool
    stands_for: int | None = None
    source: Cite = Cite("hf-modeling", "parameters of the model class")
    updated: bool = True

    @property
    def trained(self) -> bool:
        """Whether the optimizer updates it."""
        return self.trainable and self.updated

    @property
    def keeps_gradient(self) -> bool:
        """Whether it gets a gradient that no optimizer clears, and that is added to ever after."""
        return self.trainable and not self.updated

    @property
    def parameters(self) -> int:
        """Parameters that this tensor holds or stands for."""
        return elements(self.shape)[0] if self.stands_for is None else self.stands_for

    @property
    def bytes(self) -> int:
        """Bytes of its storage."""
        return elements(self.shape)[0] * self.dtype.width


class Forward(Protocol):
    """What a module or a family needs while the forward pass runs (estimator.model.forward)."""

    def param(self, module: str, weight: Weight) -> Param:
        """Return the parameter behind a weight; the same one at every call."""
        ...


class Adapter(Protocol):
    """What a PEFT method adds to one linear layer."""

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the tensors that it adds."""
        ...

    def forward(self, run: Any, linear: Linear, x: Tensor) -> Tensor:
        """Run the layer with the adapter around it."""
        ...


class TableAdapter(Protocol):
    """What a PEFT method adds to an embedding."""

    def weights(self, table: Embedding) -> tuple[Weight, ...]:
        """Return the tensors that it adds."""
        ...

    def merged(self, run: Any, table: Embedding) -> Tensor:
        """Return the table that rows are looked up in."""
        ...


class Wrapper(Struct, frozen=True):
    """How PEFT's LoRA layer for a format treats what its base returns.

    Args:
        clones: the base's output is copied first.
        converts: what is cast back to the type of the base's output. `sum always` casts input and
            sum under autocast too; the others cast only outside autocast.
        in_place: the update is added to the base's output itself.
    """

    clones: bool = False
    in_place: bool = False
    converts: Literal["sum always", "sum", "update", "unscaled update"] = "sum always"


class WeightFormat(Protocol):
    """How a linear layer stores its weight other than as a plain tensor."""

    wrapper: ClassVar[Wrapper]

    @property
    def adapter_dtype(self) -> DType | None:
        """The type that PEFT takes the stored weight to have; None if it is no floating one."""
        ...

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the stored tensors."""
        ...

    def forward(self, run: Any, linear: Linear, x: Tensor) -> Tensor:
        """Run the layer's matrix product."""
        ...


class Product(Protocol):
    """How a linear layer multiplies by its plain weight, other than as torch's linear does."""

    def weights(self, linear: Linear) -> tuple[Weight, ...]:
        """Return the tensors that the layer keeps for it beside its weight."""
        ...

    def forward(self, run: Any, weight: Param, bias: Param | None, x: Tensor, out: Dim) -> Tensor:
        """Return `x W^T + b`."""
        ...


class Module(Struct, frozen=True, eq=False, kw_only=True):
    """A named part of the model; `dtype` is how it is stored.

    Args:
        trainable: the weights get gradients.
        trainable_bias: the bias gets one, whether or not the rest does.
        updated, updated_bias: the same of what the optimizer is given, where it gets a gradient.
        keeps_original: this is a trained copy, and the frozen original stays beside it.
    """

    name: str
    dtype: DType = DType.FLOAT32
    trainable: bool = True
    trainable_bias: bool = False
    updated: bool = True
    updated_bias: bool = False
    keeps_original: bool = False

    def weights(self) -> tuple[Weight, ...]:
        """Return the module's parameter tensors."""
        raise NotImplementedError

    def _bias(self, shape: Shape) -> Weight:
        trainable = self.trainable or self.trainable_bias
        updated = self.updated or self.updated_bias
        return Weight("bias", shape, self.dtype, trainable, updated=updated)


class Linear(Module, frozen=True, eq=False, kw_only=True):
    """A linear layer from `fan_in` to `fan_out`.

    Args:
        transposed: GPT-2's Conv1D, which stores [in, out].
        spelled_out: Falcon's `x @ W.T + b`: autocast caches no view of a weight, and the sum with
            the bias is an operator of its own. A quantized layer is no such layer any more.
        format: set when the weight is quantized.
        product: set when the layer's class multiplies in its own way.
        adapter: set when a PEFT method targets the layer.
    """

    fan_in: Dim
    fan_out: Dim
    bias: bool = False
    transposed: bool = False
    spelled_out: bool = False
    format: WeightFormat | None = None
    product: Product | None = None
    adapter: Adapter | None = None

    def weight(self) -> Weight:
        """Return the plain weight matrix."""
        shape = (self.fan_in, self.fan_out) if self.transposed else (self.fan_out, self.fan_in)
        return Weight("weight", shape, self.dtype, self.trainable, updated=self.updated)

    def bias_weight(self) -> Weight | None:
        """Return the bias, if there is one."""
        if not self.bias:
            return None
        return self._bias((self.fan_out,))

    def weights(self) -> tuple[Weight, ...]:
        stored = self.format.weights(self) if self.format else (self.weight(),)
        bias = self.bias_weight()
        added = self.adapter.weights(self) if self.adapter else ()
        state = self.product.weights(self) if self.product else ()
        return (*stored, *((bias,) if bias else ()), *added, *state)


class Norm(Module, frozen=True, eq=False, kw_only=True):
    """A normalisation with a weight and, for LayerNorm, a bias; or with neither (not `affine`).

    Args:
        copied: a copy is used and trained in place of the weights, which stay beside it.
    """

    width: Dim
    bias: bool = False
    affine: bool = True
    copied: bool = False

    def weights(self) -> tuple[Weight, ...]:
        if not self.copied:
            return self.used()
        frozen = replace(self, trainable=False, trainable_bias=False, copied=False)
        originals = [replace(each, name=f"base_layer.{each.name}") for each in frozen.used()]
        return (*self.used(), *originals)

    def used(self) -> tuple[Weight, ...]:
        """Return the tensors that the forward pass reads."""
        if not self.affine:
            return ()
        shape = (self.width,)
        weight = Weight("weight", shape, self.dtype, self.trainable, updated=self.updated)
        return (weight, self._bias(shape)) if self.bias else (weight,)


class Embedding(Module, frozen=True, eq=False, kw_only=True):
    """A table of `rows` vectors.

    Args:
        rows_trained: set when some of its rows are trained, and the table itself is not.
    """

    rows: Dim
    width: Dim
    rows_trained: TableAdapter | None = None

    def weights(self) -> tuple[Weight, ...]:
        shape = (self.rows, self.width)
        table = Weight("weight", shape, self.dtype, self.trainable, updated=self.updated)
        added = self.rows_trained.weights(self) if self.rows_trained is not None else ()
        return (table, *added)


class VirtualTokens(Module, frozen=True, eq=False, kw_only=True):
    """Trained vectors that PEFT puts before the text, or into the cache of every layer."""

    def prepare(self, run: Any, layers: int) -> None:
        """Do what PEFT does before the model is called.

        Args:
            layers: decoder layers that this pass runs.
        """

    def join(self, run: Any, embedded: Tensor) -> Tensor:
        """Return the input of the first layer, given the embedded text."""
        return embedded


def held(module: Module) -> tuple[Weight, ...]:
    """Return the tensors of a module, those of the frozen original behind a trained copy too.

    Source: peft, utils/other.py, ModulesToSaveWrapper.
    """
    if not module.keeps_original:
        return module.weights()
    original = replace(module, trainable=False, trainable_bias=False).weights()
    source = Cite("peft", "utils/other.py, ModulesToSaveWrapper.update")
    kept = (replace(each, name=f"original_module.{each.name}", source=source) for each in original)
    return (*module.weights(), *kept)


class LayerKind(Struct, frozen=True, eq=False):
    """One kind of decoder layer: its modules by name, and the shape of its attention.

    Args:
        name: what the layer is called in the output, such as `layer` or `sliding layer`.
        sliding_window: tokens that attention looks back, if limited.
        eager: the family's `eager_attention_forward`.
        facts: whatever else the family's forward pass asks of this kind.
        checkpointed: whole layers of this kind are recomputed in backward.
    """

    name: str
    modules: tuple[Module, ...]
    heads: Heads
    sliding_window: int | None = None
    checkpointed: bool = False
    eager: Callable[..., tuple[Tensor, Tensor]] = attention.eager
    facts: Mapping[str, Any] = {}


class Buffer(Struct, frozen=True, eq=False):
    """A tensor that is no parameter but lives on the GPU as long as the model."""

    name: str
    shape: Shape
    dtype: DType


class Family(Protocol):
    """How a model family computes; one file in `estimator/model/families/` each."""

    def embed(self, run: Any, ids: Tensor) -> Tensor:
        """Return the input of the first layer."""
        ...

    def layer(self, run: Any, kind: LayerKind, hidden: Tensor) -> Tensor:
        """Return the output of one decoder layer."""
        ...

    def final(self, run: Any, hidden: Tensor) -> Tensor:
        """Return the input of the head."""
        ...

    def logits(self, run: Any, hidden: Tensor) -> Tensor:
        """Return the logits."""
        ...


class LossTerm(Protocol):
    """What a method adds to the loss inside the model's forward, out of its own parameters."""

    def added(self, run: Any, kinds: tuple[LayerKind, ...], loss: Tensor) -> Tensor:
        """Return the loss with the term in it.

        Args:
            kinds: the layers that this pass has run; the first is at site 1.
        """
        ...


class ModelSpec(Struct, frozen=True, eq=False):
    """A causal language model.

    Args:
        model_type: as `config.json` says.
        pattern: for each layer, the index of its kind.
        layers_path: the dotted path of the list of layers.
        tied: the head shares its weight with the first embedding.
        max_positions: the longest sequence that a table of positions allows, if there is one.
        rotary_width: width of the rotary tables; 0 without rotary positions.
        supports_sdpa: whether the model class runs torch's scaled dot product attention.
        supports_flash: whether it runs FlashAttention 2.
        supports_flex: whether it runs flex attention.
        attention_interface: attention is a function that transformers looks up by name.
        takes_positions: `position_ids` of the batch reach the mask and the embeddings.
        trainers_batch: the batch is what the Trainer fetches: with a mask, and for a whole step.
        scaled_positions: rotary positions are stretched.
        broadcasts_keys: sdpa gets one key head for all query heads, which no fused kernel takes.
        loss_term: what the method adds to the loss of the model.
    """

    model_type: str
    family: Family
    hidden: Dim
    vocab: Dim
    embeddings: tuple[Module, ...]
    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...]
    final: tuple[Module, ...]
    head: Linear
    tied: bool
    layers_path: str = "model.layers"
    buffers: tuple[Buffer, ...] = ()
    max_positions: int | None = None
    rotary_width: int = 0
    supports_sdpa: bool = True
    supports_flash: bool = True
    supports_flex: bool = True
    broadcasts_keys: bool = False
    attention_interface: bool = True
    takes_positions: bool = True
    trainers_batch: bool = True
    scaled_positions: bool = False
    loss_term: LossTerm | None = None
    notes: tuple[str, ...] = ()

    @property
    def virtual_tokens(self) -> VirtualTokens | None:
        """The module that makes virtual tokens, if the method has one."""
        last = self.embeddings[-1]
        return last if isinstance(last, VirtualTokens) else None

    def formats(self) -> tuple[WeightFormat, ...]:
        """Return the format of each packed linear layer."""
        linears = (each for each, _ in self.module_counts() if isinstance(each, Linear))
        return tuple(each.format for each in linears if each.format is not None)

    def module_counts(self) -> Iterator[tuple[Module, int]]:
        """Yield every module with the number of times it occurs; a tied head is left out."""
        for module in self.embeddings:
            yield module, 1
        counts = Counter(self.pattern)
        for index, kind in enumerate(self.kinds):
            for module in kind.modules:
                yield module, counts[index]
        for module in self.final:
            yield module, 1
        if not self.tied:
            yield self.head, 1

    def tensors(self) -> Iterator[tuple[Module, Weight, int]]:
        """Yield every stored parameter tensor with its module and count; tied ones once."""
        for module, count in self.module_counts():
            for weight in held(module):
                yield module, weight, count
        if self.tied and self.head.adapter is not None:
            for weight in self.head.adapter.weights(self.head):
                yield self.head, weight, 1
        if self.tied and self.head.product is not None:
            for weight in self.head.product.weights(self.head):
                yield self.head, weight, 1

    def total_parameters(self) -> int:
        """Count all parameters; tied tensors once, packed ones by what they stand for."""
        return sum(weight.parameters * count for _, weight, count in self.tensors())

    def trainable_parameters(self) -> int:
        """Count the parameters that the optimizer updates."""
        return sum(
            weight.parameters * count for _, weight, count in self.tensors() if weight.trained
        )

    def map_modules(self, change: Any) -> ModelSpec:
        """Return a copy with `change(module)` in place of each module, the head included."""
        return replace(
            self,
            embeddings=tuple(change(each) for each in self.embeddings),
            kinds=tuple(
                replace(kind, modules=tuple(change(each) for each in kind.modules))
                for kind in self.kinds
            ),
            final=tuple(change(each) for each in self.final),
            head=change(self.head),
        )

    def map_paths(self, change: Callable[[Module, str], Module], *, every_layer: bool) -> ModelSpec:
        """Return a copy with `change(module, its dotted path)` in place of each module.

        Args:
            every_layer: the number in the path matters; layers that come out different become
                kinds of their own. Otherwise the first layer of a kind speaks for all.
        """
        stem = self.layers_path.rpartition(".")[0]
        whole = replace(
            self,
            embeddings=tuple(change(each, f"{stem}.{each.name}") for each in self.embeddings),
            final=tuple(change(each, f"{stem}.{each.name}") for each in self.final),
            head=change(self.head, self.head.name),
        )

        def changed(index: int) -> LayerKind:
            kind = self.kinds[self.pattern[index]]
            stem = f"{self.layers_path}.{index}"
            modules = (change(each, f"{stem}.{each.name}") for each in kind.modules)
            return replace(kind, modules=tuple(modules))

        if every_layer:
            return _regrouped(whole, tuple(changed(index) for index in range(len(self.pattern))))
        firsts = (self.pattern.index(number) for number in range(len(self.kinds)))
        return replace(whole, kinds=tuple(changed(index) for index in firsts))


def _regrouped(spec: ModelSpec, layers: tuple[LayerKind, ...]) -> ModelSpec:
    """Return the model with these layers, alike ones of one kind.

    Backward stops where nothing below is trained, so layers in front of the first trained tensor
    and the first layer that has one are kinds of their own. So is a layer whose next one differs,
    because the next one may keep its output.
    """
    reached = any(weight.trainable for each in spec.embeddings for weight in each.weights())
    marks: list[Any] = []
    for kind, layer in zip(spec.pattern, layers, strict=True):
        marks.append((kind, reached, tuple(astuple(each) for each in layer.modules)))
        reached = reached or any(
            weight.trainable for each in layer.modules for weight in each.weights()
        )
    pairs = list(zip(marks, [*marks[1:], None], strict=True))
    kinds = dict(zip(reversed(pairs), reversed(layers), strict=True))
    order = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    return replace(
        spec,
        kinds=tuple(kinds[pair] for pair in order),
        pattern=tuple(order[pair] for pair in pairs),
    )
