"""What every fine-tuning method has in common: a section of the request that rewrites a run."""

import re
from collections.abc import Callable, Iterable
from typing import ClassVar, Final, Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Adapter, Embedding, LayerKind, Linear, ModelSpec, Module
from estimator.run import Run
from estimator.section import Kind, Names
from estimator.sources import Cite
from estimator.techniques.stage import Stage

FOUR_BIT: Final = frozenset({"nf4", "fp4"})
"""The 4-bit formats of bitsandbytes."""


class Method(Kind, frozen=True):
    """What is trained; the fields are the knobs, spelled as the library spells them.

    Args:
        stage: methods apply before weights get their types and formats.
        trains_base: weights of the model itself are trained, so they cannot be quantized.
        quantizations: names of the formats of the base weights that it was checked over; None for
            all of them.
        peft: name of PEFT's configuration class, if PEFT runs the method.
        takes_turns: every few steps another part of the model is trained.
        optimizers, precisions: names of those that it was compared with; None for all of them.
        without_backward: its step evaluates the loss only.
        source: the paper or the upstream line.
    """

    stage: ClassVar[Stage] = Stage.ADAPT
    trains_base: ClassVar[bool] = False
    quantizations: ClassVar[frozenset[str] | None] = FOUR_BIT
    peft: ClassVar[str | None] = None
    takes_turns: ClassVar[bool] = False
    optimizers: ClassVar[frozenset[str] | None] = None
    precisions: ClassVar[frozenset[str] | None] = None
    without_backward: ClassVar[bool] = False
    source: ClassVar[Cite]

    @property
    def singles_out_layers(self) -> bool:
        """Whether it treats some layers unlike others, so that no layer stands for another."""
        return False

    @property
    def leaves_gradients(self) -> bool:
        """Whether weights get gradients that its optimizer does not have, and nothing clears."""
        return False

    def apply(self, run: Run) -> Run:
        """Return the run with the method in it."""
        raise NotImplementedError

    def refuse(self, quantization: str) -> None:
        """Refuse a format of the base weights that the method does not go with.

        Raises:
            UnsupportedCombinationError: by name, with what to use instead.
        """
        if self.quantizations is not None and quantization not in self.quantizations:
            known = ", ".join(sorted(self.quantizations)) or "none"
            raise UnsupportedCombinationError(
                f"method {self.name!r} over {quantization} weights has no sourced answer here "
                f"(over which it has: {known}); use lora, or no quantization"
            )


class Targets(Struct, frozen=True):
    """Which linear layers get an adapter, chosen by their dotted path as PEFT chooses them.

    `all-linear` is every linear layer but the head. A name stands for the layers that it ends the
    path of, behind a dot.

    Source: peft, tuners/tuners_utils.py, check_target_module_exists and
    _maybe_include_all_linear_layers.
    """

    target_modules: Literal["all-linear"] | Names
    exclude_modules: Names = ()
    modules_to_save: Names = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: Names = ()

    @property
    def names_layers(self) -> bool:
        """Whether the number of a layer can decide."""
        names = () if isinstance(self.target_modules, str) else self.target_modules
        return bool(self.layers_to_transform) or _has_number(
            (*names, *self.exclude_modules, *self.modules_to_save)
        )

    def match(self, path: str, head: str) -> bool:
        """Whether the layer at a path is a target."""
        if _ends_with(path, self.exclude_modules):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            found = path != head
        else:
            found = _ends_with(path, self.target_modules)
        return found and (not self.layers_to_transform or self._layer(path))

    def _layer(self, path: str) -> bool:
        """Whether the layer's number is one of those to transform."""
        patterns = [rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\." for each in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            found = re.match(pattern, path)
            if found:
                return int(found["idx"]) in self.layers_to_transform
        return False


def _ends_with(path: str, names: Names) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _has_number(names: Iterable[str]) -> bool:
    return any(part.isdigit() for name in names for part in name.split("."))


def frozen(spec: ModelSpec) -> ModelSpec:
    """Freeze every weight."""
    return spec.map_modules(lambda module: replace(module, trainable=False))


def adapted(
    spec: ModelSpec,
    targets: Targets | tuple[str, ...] | str,
    adapter: Callable[[Linear], Adapter],
) -> ModelSpec:
    """Freeze every weight and put an adapter on each targeted linear layer.

    Raises:
        InvalidRequestError: the targets match no linear layer of the model, as PEFT refuses.
    """
    chosen = targets if isinstance(targets, Targets) else _targets(targets)
    return adapted_by_path(spec, chosen, lambda linear, _: adapter(linear))


def _targets(targets: tuple[str, ...] | str) -> Targets:
    return Targets("all-linear" if isinstance(targets, str) else targets)


def adapted_by_path(
    spec: ModelSpec,
    targets: Targets,
    adapter: Callable[[Linear, str], Adapter],
    *,
    every_layer: bool = False,
) -> ModelSpec:
    """Freeze every weight and put an adapter on each target, given the layer and its path.

    Args:
        every_layer: the adapter depends on the number of the layer.

    Raises:
        InvalidRequestError: the targets match no linear layer of the model, as PEFT refuses.
    """
    head = spec.head.name
    named = not isinstance(targets.target_modules, str)
    adapters = 0

    def adapt(module: Module, path: str) -> Module:
        nonlocal adapters
        frozen = replace(module, trainable=False)
        if isinstance(module, Embedding) and named and targets.match(path, head):
            raise UnsupportedCombinationError(
                f"an adapter on the table {module.name!r} has no sourced answer here yet; train it "
                "through modules_to_save, or leave it out of target_modules"
            )
        if isinstance(frozen, Linear) and targets.match(path, head):
            adapters += 1
            return replace(frozen, adapter=adapter(frozen, path))
        return frozen

    out = spec.map_paths(adapt, every_layer=every_layer or targets.names_layers)
    if not adapters:
        linears = {each.name for each, _ in spec.module_counts() if isinstance(each, Linear)}
        known = sorted({name.rsplit(".", 1)[-1] for name in linears if name != head})
        raise InvalidRequestError(
            f"target_modules {_shown(targets.target_modules)} match no linear layer of this "
            f"{spec.model_type} model{_in_layers(targets)}; it has {', '.join(known)}"
        )
    return out


def _shown(targets: str | Names) -> str:
    return targets if isinstance(targets, str) else str(list(targets))


def _in_layers(targets: Targets) -> str:
    if not targets.layers_to_transform:
        return ""
    return f" in layers_to_transform {list(targets.layers_to_transform)}"


def saved(spec: ModelSpec, names: Names) -> ModelSpec:
    """Train a copy of each named module in full; the frozen original stays beside it.

    PEFT takes every module whose path ends with a name, dot or not. A tied head and embedding come
    apart: each is copied for itself, and both share one original.

    Raises:
        UnsupportedCombinationError: a name that matches no single layer, norm or embedding.

    Source: peft, utils/other.py, _set_trainable and ModulesToSaveWrapper.update.
    """
    if not names:
        return spec
    found: set[str] = set()

    def save(module: Module, path: str) -> Module:
        matching = [name for name in names if path.endswith(name)]
        if not matching:
            return module
        found.update(matching)
        return replace(module, trainable=True, keeps_original=True)

    out = spec.map_paths(save, every_layer=_has_number(names))
    missing = [name for name in names if name not in found]
    if missing:
        raise UnsupportedCombinationError(
            f"modules_to_save {missing} match no linear layer, norm or embedding of this "
            f"{spec.model_type} model; name those themselves, such as {spec.head.name!r} or "
            f"{spec.embeddings[0].name!r}"
        )
    return _untied(out) if out.tied else out


def _untied(spec: ModelSpec) -> ModelSpec:
    """Take a tied head and embedding apart where one of them is trained as a copy.

    The one original is counted once: as the module that was not copied, if there is one.
    """
    table, head = spec.embeddings[0], spec.head
    if not (table.keeps_original or head.keeps_original):
        return spec
    table = replace(table, keeps_original=table.keeps_original and head.keeps_original)
    head = replace(head, keeps_original=False)
    return replace(spec, tied=False, embeddings=(table, *spec.embeddings[1:]), head=head)


def with_biases(spec: ModelSpec, which: Literal["none", "all", "lora_only"]) -> ModelSpec:
    """Train biases beside the adapters: every one, or those of the layers that have an adapter.

    Source: peft, tuners/tuners_utils.py, BaseTuner._mark_only_adapters_as_trainable.
    """
    if which == "none":
        return spec

    def train(module: Module, _: str) -> Module:
        has_adapter = isinstance(module, Linear) and module.adapter is not None
        return replace(module, trainable_bias=True) if which == "all" or has_adapter else module

    return spec.map_paths(train, every_layer=False)


class _Place(NamedTuple):
    """What a layer is among its like: two of one place do the same work."""

    kind: int
    chosen: bool
    wants_input: bool


def by_layer(
    spec: ModelSpec,
    chosen: Callable[[int], bool],
    change: Callable[[LayerKind, bool], LayerKind],
) -> ModelSpec:
    """Return the model with some of its decoder layers changed apart from the others.

    A kind of layer is split where its layers do different work. Below the first layer that trains
    anything no graph is built, so nothing is saved there; the layer right below it is a kind of its
    own, because the next one may keep its output.

    Args:
        chosen: whether a layer, by its index, is among those that train something.
        change: returns a kind as it is in a chosen layer, or in one that is not.
    """
    trained = [chosen(index) for index in range(len(spec.pattern))]
    from_below = any(weight.trainable for each in spec.embeddings for weight in each.weights())
    places = [
        _Place(kind, trained[index], from_below or any(trained[:index]))
        for index, kind in enumerate(spec.pattern)
    ]
    pairs = list(zip(places, [*places[1:], None], strict=True))
    distinct = tuple(dict.fromkeys(pairs))
    kinds = tuple(change(spec.kinds[here.kind], here.chosen) for here, _ in distinct)
    return replace(spec, kinds=kinds, pattern=tuple(distinct.index(each) for each in pairs))
