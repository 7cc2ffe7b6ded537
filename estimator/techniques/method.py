"""What every fine-tuning method has in common: a section of the request that rewrites a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from msgspec.structs import replace

from estimator.errors import InvalidRequestError
from estimator.model.spec import Adapter, LayerKind, Linear, ModelSpec, Module
from estimator.run import Run
from estimator.section import Kind
from estimator.sources import Cite
from estimator.techniques.stage import Stage


class Method(Kind, frozen=True):
    """What is trained; the fields are the knobs, spelled as the library spells them.

    Args:
        stage: methods apply before weights get their types and formats.
        trains_base: weights of the model itself are trained, so they cannot be quantized.
        peft: name of PEFT's configuration class, if PEFT runs the method.
        source: the paper or the upstream line.
    """

    stage: ClassVar[Stage] = Stage.ADAPT
    trains_base: ClassVar[bool] = False
    peft: ClassVar[str | None] = None
    source: ClassVar[Cite]

    @property
    def singles_out_layers(self) -> bool:
        """Whether it treats some layers unlike others, so that no layer stands for another."""
        return False

    def apply(self, run: Run) -> Run:
        """Return the run with the method in it."""
        raise NotImplementedError


def target_matcher(targets: tuple[str, ...] | str, head: str) -> Callable[[str], bool]:
    """Return the test for a targeted name: its own, or its end behind a dot, as in PEFT.

    `all-linear` is every linear layer but the head.

    Source: peft, tuners/tuners_utils.py, check_target_module_exists and
    _maybe_include_all_linear_layers.
    """
    if isinstance(targets, str):
        return lambda name: name != head
    return lambda name: any(name == each or name.endswith(f".{each}") for each in targets)


def frozen(spec: ModelSpec) -> ModelSpec:
    """Freeze every weight."""
    return spec.map_modules(lambda module: replace(module, trainable=False))


def adapted(
    spec: ModelSpec, targets: tuple[str, ...] | str, adapter: Callable[[Linear], Adapter]
) -> ModelSpec:
    """Freeze every weight and put an adapter on each targeted linear layer.

    Raises:
        InvalidRequestError: the targets match no linear layer of the model, as PEFT refuses.
    """
    head = spec.head.name
    matches = target_matcher(targets, head)
    linears = {each.name for each, _ in spec.module_counts() if isinstance(each, Linear)}
    if not any(matches(name) for name in (*linears, head)):
        known = sorted({name.rsplit(".", 1)[-1] for name in linears if name != head})
        raise InvalidRequestError(
            f"target_modules {list(targets)} match no linear layer of this "
            f"{spec.model_type} model; it has {', '.join(known)}"
        )

    def adapt(module: Module) -> Module:
        frozen = replace(module, trainable=False)
        if isinstance(frozen, Linear) and matches(frozen.name):
            return replace(frozen, adapter=adapter(frozen))
        return frozen

    return spec.map_modules(adapt)


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
