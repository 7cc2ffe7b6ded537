"""Partial fine-tuning: some layers, modules or kinds of parameter are trained, as they are."""

from typing import Annotated, ClassVar, Final, TypeVar

from msgspec import Meta
from msgspec.structs import replace

from estimator.errors import InvalidRequestError
from estimator.model.spec import Embedding, LayerKind, ModelSpec, Module, Norm
from estimator.run import Run
from estimator.section import Names
from estimator.sources import Cite
from estimator.techniques.method import Method, by_layer

M = TypeVar("M", bound=Module)
LEFT: Final = (
    "freeze_others=false: the optimizer has {given:,} parameters, which are called trainable here; "
    "{left:,} others require gradients too, and keep them from the first step on, because its "
    "zero_grad clears those of its own parameters alone. Freezing them changes nothing that is "
    "trained"
)


class Partial(Method, frozen=True, tag="partial"):
    """Train the named parts of the model as they are; nothing is added.

    `modules`, `norms` and `biases` say which parts of the decoder layers are trained, all of them
    where none is named, and `last_layers` in which layers. Outside the layers only what is named
    is trained. Below the first trained tensor no graph is built, so nothing is saved there.

    Where the others are not frozen, the named parts are what a hand-written loop gives to its
    optimizer. Every other weight gets a gradient all the same, which is added to in each backward
    and cleared by nobody: `Optimizer.zero_grad` goes over the optimizer's own parameters. A loop
    that calls the model's `zero_grad`, as the Trainer does, is not meant.

    Source: llamafactory, model/adapter.py, _setup_freeze_tuning; zaken2021, section 3 (biases);
    torch-optim, optimizer.py, Optimizer.zero_grad (others that are not frozen).
    """

    trains_base: ClassVar[bool] = True
    source: ClassVar[Cite] = Cite("llamafactory", "model/adapter.py, _setup_freeze_tuning")

    last_layers: Annotated[
        Annotated[int, Meta(ge=1, le=100_000)] | None,
        Meta(description="Decoder layers trained, from the last one."),
    ] = None
    modules: Annotated[
        Names, Meta(description="Modules trained, by name: lm_head,q_proj,mlp.")
    ] = ()
    norms: Annotated[bool, Meta(description="Train the norms.")] = False
    biases: Annotated[bool, Meta(description="Train the biases (BitFit).")] = False
    embeddings: Annotated[bool, Meta(description="Train the embedding tables.")] = False
    freeze_others: Annotated[
        bool,
        Meta(
            description="Freeze what is not trained. If not, only the optimizer leaves it out: "
            "its gradients are made, and stay."
        ),
    ] = True

    @property
    def leaves_gradients(self) -> bool:
        """Whether the others are not frozen."""
        return not self.freeze_others

    @property
    def singles_out_layers(self) -> bool:
        """Whether only the last layers are trained."""
        return self.last_layers is not None

    def apply(self, run: Run) -> Run:
        """Return the run with everything frozen, or left out, but the named parts.

        Raises:
            InvalidRequestError: nothing is named, or a name that the model has not.
        """
        spec = run.spec
        self._refuse(spec)
        table = spec.embeddings[0]
        tied = spec.tied and (self._names(spec.head) or self._names(table))
        spec = replace(
            spec,
            embeddings=tuple(self._with(each, tied and each is table) for each in spec.embeddings),
            final=tuple(self._with(each) for each in spec.final),
            head=self._with(spec.head, tied),
        )
        layers = [module for kind in spec.kinds for module in kind.modules]
        named = self.norms or self.biases or any(self._names(each) for each in layers)
        every = self.last_layers is not None and not named
        first = len(spec.pattern) - (self.last_layers or len(spec.pattern))

        def change(kind: LayerKind, chosen: bool) -> LayerKind:
            if not chosen:
                return self._without(kind)
            return replace(kind, modules=tuple(self._with(each, every) for each in kind.modules))

        chosen = named or every
        spec = by_layer(spec, lambda index: chosen and index >= first, change)
        return replace(run, spec=spec if self.freeze_others else _told(spec))

    def _names(self, module: Module) -> bool:
        """Whether the weights of a module are trained, by its name or its kind."""
        return (
            any(is_within(module.name, each) for each in self.modules)
            or (self.norms and isinstance(module, Norm))
            or (self.embeddings and isinstance(module, Embedding))
        )

    def _with(self, module: M, also: bool = False) -> M:
        trains = also or self._names(module)
        if not self.freeze_others:
            return replace(module, updated=trains, updated_bias=self.biases)
        return replace(module, trainable=trains, trainable_bias=self.biases)

    def _without(self, kind: LayerKind) -> LayerKind:
        """Return a kind of layer of which nothing is trained."""
        if self.freeze_others:
            return frozen_layer(kind)
        return replace(kind, modules=tuple(replace(m, updated=False) for m in kind.modules))

    def _refuse(self, spec: ModelSpec) -> None:
        """Refuse a request that names nothing, or something that the model has not."""
        if self == Partial(freeze_others=self.freeze_others):
            raise InvalidRequestError(
                "method 'partial' has nothing to train; give last_layers, modules, norms, biases "
                "or embeddings"
            )
        known = {module.name for module, _ in spec.module_counts()} | {spec.head.name}
        for each in self.modules:
            if not any(is_within(name, each) for name in known):
                ends = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
                raise InvalidRequestError(
                    f"modules: this {spec.model_type} model has no {each!r}; it has {ends}"
                )
        if self.biases and not any(weight.name == "bias" for _, weight, _ in spec.tensors()):
            raise InvalidRequestError(
                f"biases: this {spec.model_type} model has none; choose norms or modules"
            )
        if self.last_layers is not None and self.last_layers > len(spec.pattern):
            raise InvalidRequestError(
                f"last_layers: the model has {len(spec.pattern)} layers (given {self.last_layers})"
            )


def _told(spec: ModelSpec) -> ModelSpec:
    """Return the model with a note on the gradients that stay, if any do."""
    left = sum(each.parameters * count for _, each, count in spec.tensors() if each.keeps_gradient)
    if not left:
        return spec
    note = LEFT.format(given=spec.trainable_parameters(), left=left)
    return replace(spec, notes=(*spec.notes, note))


def is_within(name: str, part: str) -> bool:
    """Whether a dotted name is that of a part or of something inside it.

    Example:
        >>> is_within("mlp.up_proj", "mlp"), is_within("mlp.up_proj", "up_proj")
        (True, True)
        >>> is_within("mlp.up_proj", "proj")
        False
    """
    return f".{part}." in f".{name}."


def frozen_layer(kind: LayerKind) -> LayerKind:
    """Return a kind of layer that trains nothing."""
    return replace(
        kind,
        name=f"frozen {kind.name}",
        modules=tuple(
            replace(each, trainable=False, trainable_bias=False) for each in kind.modules
        ),
    )
