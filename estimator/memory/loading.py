"""How a model comes onto the device: its tensors and what making them needs, for each software.

What the allocator holds before the first step depends on how the model was made. What loading has
reserved stays reserved, and what it has freed serves the training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct

from estimator.eager.size import elements
from estimator.memory.average import average_sizes
from estimator.memory.ledger import Entry, Ledger, constant_row
from estimator.memory.standing import model_entries
from estimator.memory.timeline import Moment
from estimator.model.loading import Event, Loading
from estimator.model.spec import Buffer, LayerKind, Linear, Module, held
from estimator.run import Run
from estimator.sources import Cite
from estimator.techniques.torchao_nf4 import Nf4Tensor

LOADING: Final = "loading"

Serials = tuple[int, ...]


class Way(Struct, frozen=True):
    """One way of loading.

    Args:
        load: writes down what comes and goes until the model is there.
        source: where it is.
    """

    load: Callable[[Run, Loading], None]
    source: Cite


def loading(run: Run) -> list[Event]:
    """Return what comes and goes until the weights and buffers of a run are there."""
    log = Loading()
    WAYS[run.loading].load(run, log)
    return log.events


def added(run: Run) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of what is there before the first step beside the model."""
    yield from (("moving average", size) for size in average_sizes(run))
    if run.accumulates:
        for module in _modules(run):
            yield from (
                (f"{module.name}.{each.name}.grad", each.bytes)
                for each in held(module)
                if each.trained
            )


def loading_moment(run: Run) -> Moment | None:
    """Return the highest moment of loading; None where nothing is there but what stays."""
    events = loading(run)
    highest = total = most = 0
    sizes: dict[int, int] = {}
    for number, event in enumerate(events):
        if event.size is None:
            total -= sizes.pop(event.serial)
            continue
        sizes[event.serial] = event.size
        total += event.size
        if total > most:
            highest, most = number, total
    if most == total:
        return None
    return Moment(
        LOADING,
        (most, 0, 0, 0, 0, 0, 0, 0),
        _Loaded(_alive(run, events[: highest + 1])),
        multiplies=False,
    )


class _Loaded(Struct, frozen=True):
    """What is there at one instant of loading."""

    always: Ledger

    def passing(self) -> Ledger:
        """Return nothing: no tensor depends on the batch."""
        return Ledger(())


def _alive(run: Run, events: list[Event]) -> Ledger:
    """Return the ledger of what is there after some events."""
    there: dict[int, Event] = {}
    for event in events:
        if event.size is None:
            del there[event.serial]
        else:
            there[event.serial] = event
    rows = {each.row.name: each.row for each in model_entries(run)}
    source = WAYS[run.loading].source
    counts = Counter((each.name, each.component, each.size or 0) for each in there.values())
    return Ledger(
        tuple(
            Entry(
                rows[name]
                if name in rows and rows[name].size == (size, 0)
                else constant_row(name, component, "process", size, f"{size} B", source),
                count,
            )
            for (name, component, size), count in counts.items()
        )
    )


# -- ways ----------------------------------------------------------------------------------------


def _one_by_one(run: Run, log: Loading) -> None:
    """Allocate weights, then buffers, in the model's order: nothing else is on the device."""
    for module in _modules(run):
        _plain(log, module)
    for buffer in run.spec.buffers:
        _table(log, buffer)


def _modules(run: Run) -> Iterator[Module]:
    """Yield every module as often as it is there, in the model's order."""
    spec = run.spec
    yield from spec.embeddings
    for index in spec.pattern:
        yield from spec.kinds[index].modules
    yield from spec.final
    if not spec.tied:
        yield spec.head


def _plain(log: Loading, module: Module) -> Serials:
    return tuple(log.new(f"{module.name}.{each.name}", each.bytes) for each in held(module))


def _bytes(buffer: Buffer) -> int:
    return elements(buffer.shape)[0] * buffer.dtype.width


def _table(log: Loading, buffer: Buffer) -> Serials:
    return (log.new(buffer.name, _bytes(buffer), "buffers"),)


# In the order in which torchtune's builders make them, and in which a layer has them.
_MADE: Final = (
    "q_proj", "k_proj", "v_proj", "output_proj", "pos_embeddings", "w1", "w2", "w3", "sa_norm",
    "mlp_norm",
)  # fmt: skip
_HELD: Final = (
    "sa_norm", "q_proj", "k_proj", "v_proj", "output_proj", "pos_embeddings", "mlp_norm", "w1",
    "w2", "w3",
)  # fmt: skip


class _Torchtune:
    """torchtune's builders and `load_state_dict`, which run on the device.

    Source: torchtune-0-1, recipes/lora_finetune_single_device.py, _setup_model.
    """

    def __init__(self, run: Run, log: Loading) -> None:
        self.spec = run.spec
        self.log = log
        self.packed: list[tuple[Linear, Nf4Tensor, Serials]] = []

    def copied(self) -> None:
        """Make one layer and copy it for every layer of the model; the first is freed then.

        Source: torchtune-0-1, torchtune/modules/transformer.py, _get_clones.
        """
        tables = self._tables(len(self.spec.pattern))
        first = self._layer(self.spec.kinds[self.spec.pattern[0]], tables[0], copies=False)
        self.packed.clear()
        self._around()
        for index, table in zip(self.spec.pattern, tables, strict=True):
            self._layer(self.spec.kinds[index], table, copies=True)
        self.log.drop(first)
        self._load()

    def built(self) -> None:
        """Make every layer on its own; a full model has one table, made first.

        Source: torchtune, models/llama2/_component_builders.py, llama2 and lora_llama2.
        """
        spec, number = self.spec, len(self.spec.pattern)
        shared = len(spec.buffers) < 2 * number
        if shared:
            self._rotary(self._tables(1)[0])
        tables = [()] * number if shared else self._tables(number)
        for index, table in zip(spec.pattern, tables, strict=True):
            self._layer(spec.kinds[index], table, copies=False)
        self._around()
        self._load()

    def _tables(self, layers: int) -> list[tuple[Buffer, ...]]:
        buffers = self.spec.buffers
        share = len(buffers) // layers
        return [buffers[share * each : share * (each + 1)] for each in range(layers)]

    def _layer(self, kind: LayerKind, table: tuple[Buffer, ...], *, copies: bool) -> Serials:
        modules = {each.name: each for each in kind.modules}
        made: list[Serials] = []
        for name in _HELD if copies else _MADE:
            if name in modules:
                made.append(self._module(modules[name], copies=copies))
            elif copies:
                made += [_table(self.log, each) for each in table]
            else:
                made.append(self._rotary(table))
        return tuple(serial for serials in made for serial in serials)

    def _module(self, module: Module, *, copies: bool = False) -> Serials:
        packing = getattr(module, "format", None)
        if not isinstance(module, Linear) or not isinstance(packing, Nf4Tensor):
            return _plain(self.log, module)
        if copies:
            parts = packing.copied(self.log, module)
        else:
            plain = self.log.scratch("weight to be packed", module.weight().bytes)
            parts = packing.quantize(self.log, module)
            self.log.drop(plain)
        self.packed.append((module, packing, parts))
        others = held(module)[len(packing.weights(module)) :]
        return (*parts, *(self.log.new(f"{module.name}.{x.name}", x.bytes) for x in others))

    def _rotary(self, table: tuple[Buffer, ...]) -> Serials:
        """Make the tables of positions: an angle, its cosine and its sine are stacked.

        Source: torchtune, modules/position_embeddings.py, build_rope_cache.
        """
        made: list[Serials] = []
        for each in table:
            angles = [self.log.scratch("rotary angles", _bytes(each) // 2) for _ in range(3)]
            made.append(_table(self.log, each))
            self.log.drop(*angles)
        return tuple(serial for serials in made for serial in serials)

    def _around(self) -> None:
        """Make what is not in the layers."""
        for module in self.spec.embeddings:
            self._module(module)
        for module in (*(() if self.spec.tied else (self.spec.head,)), *self.spec.final):
            self._module(module)

    def _load(self) -> None:
        """Copy the checkpoint in from the host; only packed weights need anything for that."""
        for module, packing, parts in self.packed:
            packing.filled(self.log, module, parts)


def _torchtune_copied(run: Run, log: Loading) -> None:
    _Torchtune(run, log).copied()


def _torchtune_built(run: Run, log: Loading) -> None:
    _Torchtune(run, log).built()


WAYS: Final[dict[str, Way]] = {
    "one by one": Way(_one_by_one, Cite("torch-allocator", "round_size")),
    "torchtune-0-1": Way(
        _torchtune_copied, Cite("torchtune-0-1", "torchtune/modules/transformer.py, _get_clones")
    ),
    "torchtune-0-3": Way(
        _torchtune_copied, Cite("torchtune-0-3", "torchtune/modules/transformer.py, _get_clones")
    ),
    "torchtune": Way(_torchtune_built, Cite("torchtune", "models/llama2/_component_builders.py")),
}
