"""How a model comes onto the device: its tensors and what making them needs, for each software.

What the allocator holds before the first step depends on how the model was made. What loading has
reserved stays reserved, and what it has freed serves the training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct

from estimator.memory import loading_checkpoint
from estimator.memory.average import average_sizes
from estimator.memory.ledger import Entry, Ledger, constant_row
from estimator.memory.loading_parts import modules, named, table
from estimator.memory.loading_torchtune import layers_built, layers_copied
from estimator.memory.master_copies import master_copies
from estimator.memory.standing import model_entries
from estimator.memory.timeline import Moment
from estimator.model.loading import Event, Loading
from estimator.model.spec import held
from estimator.run import Run
from estimator.sources import Cite

LOADING: Final = "loading"
ONE_BY_ONE: Final = "one by one"


class Way(Struct, frozen=True):
    """One way of loading.

    Args:
        load: writes down what comes and goes until the model is there.
        source: where it is.
        assumption: what is taken for granted of the user's code.
        suits: which runs it is for; None for all.
        otherwise: the way of other runs.
        frees: something goes again that may be more than what stays.
    """

    load: Callable[[Run, Loading], None]
    source: Cite
    assumption: str = ""
    suits: Callable[[Run], bool] | None = None
    otherwise: str = ONE_BY_ONE
    frees: bool = True


def loading(run: Run) -> list[Event]:
    """Return what comes and goes until the weights and buffers of a run are there."""
    log = Loading()
    way_of(run).load(run, log)
    return log.events


def way_of(run: Run) -> Way:
    """Return how the model of a run is loaded; what is not packed comes from the host as it is."""
    way = WAYS[run.loading]
    while way.suits is not None and not way.suits(run):
        way = WAYS[way.otherwise]
    return way


def loading_assumptions(run: Run) -> tuple[str, ...]:
    """Return what is taken for granted of how the user's code loads."""
    said = way_of(run).assumption
    return (said,) if said else ()


def added(run: Run) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of what is there before the first step beside the model."""
    yield from (("moving average", size) for size in average_sizes(run))
    yield from master_copies(run)


def gradients_there(run: Run) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of the gradients to which all micro-batches but the first add."""
    if run.gathers:
        for module in modules(run):
            yield from (
                (f"{module.name}.{each.name}.grad", each.bytes)
                for each in held(module)
                if each.trained
            )


def loading_moment(run: Run) -> Moment | None:
    """Return the highest moment of loading; None where nothing is there but what stays."""
    if not way_of(run).frees:
        return None
    events = loading(run)
    highest = total = most = 0
    sizes: dict[int, int] = {}
    for number, event in enumerate(events):
        if event.size is None:
            total -= sizes.pop(event.serial, 0)
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

    def sizes(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Return nothing."""
        return iter(())


def _alive(run: Run, events: list[Event]) -> Ledger:
    """Return the ledger of what is there after some events."""
    there: dict[int, Event] = {}
    for event in events:
        if event.size is None:
            there.pop(event.serial, None)
        else:
            there[event.serial] = event
    rows = {each.row.name: each.row for each in model_entries(run)}
    source = way_of(run).source
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
    known: dict[int, tuple[tuple[str, int], ...]] = {}
    for module in modules(run):
        # The layers of one kind are one and the same object here.
        tensors = known.get(id(module))
        if tensors is None:
            tensors = known[id(module)] = tuple(named(module))
        for name, size in tensors:
            log.new(name, size)
    for buffer in run.spec.buffers:
        table(log, buffer)


_PACKED: Final = (
    "loading: from_pretrained with a BitsAndBytesConfig packs a checkpoint of whole weights on the "
    "GPU, tensor by tensor, and the Trainer empties the cache before the first step"
)
WAYS: Final[dict[str, Way]] = {
    ONE_BY_ONE: Way(
        _one_by_one,
        Cite("hf-trainer", "Trainer._move_model_to_device"),
        "loading: the model is made on the host and moved to the GPU, one tensor after the other",
        frees=False,
    ),
    "transformers-5": Way(
        loading_checkpoint.newer,
        Cite("hf-loading-weights", "convert_and_load_state_dict_in_model"),
        _PACKED,
        loading_checkpoint.packs,
    ),
    "transformers-4": Way(
        loading_checkpoint.older,
        Cite("hf-4-46", "quantizers/quantizer_bnb_4bit.py, create_quantized_param"),
        _PACKED,
        loading_checkpoint.packs,
    ),
    "trl": Way(
        loading_checkpoint.newer,
        Cite("hf-loading-weights", "convert_and_load_state_dict_in_model"),
        _PACKED,
        loading_checkpoint.packs,
        "device map",
    ),
    "device map": Way(
        loading_checkpoint.straight,
        Cite("trl", "trainer/utils.py, create_model_from_path"),
        "loading: the trainer is given the name of a model, and loads it straight to the GPU",
        loading_checkpoint.is_plain,
        # What is asked for at once is what the weights take.
        frees=False,
    ),
    "torchtune-0-1": Way(
        layers_copied, Cite("torchtune-0-1", "torchtune/modules/transformer.py, _get_clones")
    ),
    "torchtune-0-3": Way(
        layers_copied, Cite("torchtune-0-3", "torchtune/modules/transformer.py, _get_clones")
    ),
    "torchtune": Way(layers_built, Cite("torchtune", "models/llama2/_component_builders.py")),
}
