"""The moments of a step: the chain of sites put back together for the real number of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from operator import ge
from typing import Protocol

from msgspec import Struct, structs

from estimator.components import Component
from estimator.eager.size import ZERO, Lanes, Polynomial, evaluate
from estimator.eager.tensor import Instant, Live
from estimator.memory.allocator import charge
from estimator.memory.average import average_entries
from estimator.memory.clipping import clipping_entries
from estimator.memory.hessian_pass import HESSIAN
from estimator.memory.ledger import Entry, Ledger, Row, formula, polynomial
from estimator.memory.standing import standing, step_entries, step_gradients
from estimator.memory.trace import Trace
from estimator.run import Run


class Place(Protocol):
    """Where in a run a moment lies, enough to say what is alive there."""

    @property
    def always(self) -> Ledger:
        """What is alive at every moment of the same part of the run."""
        ...

    def passing(self) -> Ledger:
        """What is alive at this moment beside that."""
        ...

    def sizes(self) -> Iterator[tuple[tuple[int, int], int]]:
        """The sizes of the same, and how many tensors have each."""
        ...


class Moment(Struct, frozen=True, dict=True):
    """A moment that can be the peak: its name, and its bytes as a polynomial in b, s and t.

    What is alive is put together only when somebody asks.

    Args:
        multiplies: libraries have their workspaces by then.
    """

    name: str
    total: Polynomial
    place: Place
    multiplies: bool = True

    def bytes_at(self, at: Polynomial) -> int:
        """Bytes at the micro-batch and length whose powers are given."""
        return evaluate(self.total, at)

    @cached_property
    def passing(self) -> Ledger:
        """What is alive at this moment beside the standing entries."""
        return self.place.passing()

    def blocks_at(self, at: Polynomial) -> int:
        """Bytes of the blocks that the allocator hands out for everything alive at this moment."""
        total, sizes = self._blocks
        for coefficient, index, count in sizes:
            total += charge(coefficient * at[index]) * count
        return total

    @cached_property
    def _blocks(self) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        """The blocks of constant size, and sizes that grow: (coefficient, index, how many)."""
        total = self.standing.constant_charge
        counts: dict[tuple[int, int], int] = {}
        standing = ((each.row.size, each.count) for each in self.standing.growing)
        for size, count in (*standing, *self.place.sizes()):
            if size[1] == 0:
                total += charge(size[0]) * count
            else:
                counts[size] = counts.get(size, 0) + count
        return total, tuple((*size, count) for size, count in counts.items())

    @cached_property
    def components(self) -> tuple[tuple[Component, Polynomial], ...]:
        """The bytes by component of what is not of the same size at every batch and moment."""
        sizes: dict[Component, list[tuple[tuple[int, int], int]]] = {}
        for each in (*self.standing.growing, *self.passing.entries):
            sizes.setdefault(each.row.component, []).append((each.row.size, each.count))
        return tuple((component, polynomial(found)) for component, found in sizes.items())

    @property
    def standing(self) -> Ledger:
        """What is alive at every moment."""
        return self.place.always

    @cached_property
    def alive(self) -> Ledger:
        """Everything that is alive at this moment, less what the step has dropped by then."""
        return self.standing.plus(*self.passing.entries).less_dropped()


class Step(Struct, frozen=True, dict=True):
    """All moments of a training step that can be its peak, in the order of time.

    Args:
        pinned: what lies in pinned host memory when backward begins: (size, number of tensors).
    """

    moments: tuple[Moment, ...]
    pinned: tuple[tuple[tuple[int, int], int], ...] = ()

    def pinned_bytes(self, at: Polynomial) -> int:
        """Bytes in pinned host memory when backward begins, each block a power of two.

        Source: torch-pinned, CachingHostAllocatorImpl::allocate, PowerOf2Ceil.
        """
        return sum(
            count << (coefficient * at[index] - 1).bit_length()
            for (coefficient, index), count in self.pinned
        )

    def top(self, at: Polynomial) -> Moment:
        """Return the highest of all moments, the first of those that are equal."""
        sizes = self._sizes.at(at)
        return self._undominated[sizes.index(max(sizes))]

    @cached_property
    def _sizes(self) -> Lanes:
        return Lanes([each.total for each in self._undominated])

    @cached_property
    def _undominated(self) -> tuple[Moment, ...]:
        """The moments that no other exceeds in one coefficient and reaches in all the rest.

        Micro-batch and length are at least 1, so the others are lower everywhere.
        """
        totals = tuple(dict.fromkeys(each.total for each in self.moments))
        kept = {each for each in totals if not any(_exceeds(other, each) for other in totals)}
        return tuple(each for each in self.moments if each.total in kept)

    def highest(self, at: Polynomial) -> tuple[Moment, ...]:
        """Return the highest instant of each named moment, in the order of time."""
        found: dict[str, tuple[int, Moment]] = {}
        for moment in self.moments:
            size = moment.bytes_at(at)
            if moment.name not in found or size > found[moment.name][0]:
                found[moment.name] = (size, moment)
        return tuple(moment for _, moment in found.values())


class _Place(Struct, frozen=True):
    """Where in the assembled step a moment lies, enough to say what is alive there."""

    assembly: _Assembly
    live: Live
    site: int
    position: int
    backward: bool
    extra: tuple[Entry, ...] = ()

    @property
    def always(self) -> Ledger:
        """What is alive at every moment of the step."""
        return self.assembly.always

    def passing(self) -> Ledger:
        """List the entries of this moment that do not stand through the whole step."""
        return Ledger((*self.assembly.alive(self), *self.extra))

    def sizes(self) -> Iterator[tuple[tuple[int, int], int]]:
        """List the sizes of these entries, without what says what they are."""
        sizes = self.assembly.sizes
        yield from ((sizes[kind], count) for kind, count in self.assembly.counts(self).items())
        yield from ((each.row.size, each.count) for each in self.extra)


def compile_step(run: Run, seen: Trace, second: Trace | None = None) -> Step:
    """Return the moments of a steady-state step, the second step or a later one.

    Args:
        seen: a trace of this run, or of one that differs by the optimizer alone.
        second: a trace of the pass that some steps have behind the optimizer's, if any.
    """
    assembly = _Assembly(seen, standing(run).plus(*average_entries(run)))
    between = [*assembly.forward(), *assembly.metrics(), *assembly.backward()]
    step = step_entries(run)
    clipping = clipping_entries(run)
    return Step(
        (
            *between,
            assembly.after("end of backward", assembly.seen.end, ZERO, ()),
            *(assembly.outside("gradient clipping", each) for each in [clipping] if each),
            assembly.outside("optimizer step", step),
            *(_hessian_pass(run, second) if second is not None else ()),
        ),
        pinned=tuple(
            (size, count * assembly.times[site]) for (site, size), count in seen.host.items()
        ),
    )


def _hessian_pass(run: Run, seen: Trace) -> Iterator[Moment]:
    """Yield the moments of the pass that estimates the Hessian; the update itself is in place."""
    assembly = _Assembly(seen, standing(run).plus(*average_entries(run)))
    for each in (*assembly.forward(), *assembly.backward()):
        yield structs.replace(each, name=f"{HESSIAN}{each.name}")
    yield assembly.after(f"end of {HESSIAN}backward", seen.end, ZERO, ())
    clipping = clipping_entries(run)
    if clipping:
        yield assembly.outside(f"{HESSIAN}gradient clipping", clipping)
    yield assembly.outside(f"{HESSIAN}optimizer step", tuple(step_gradients(run)))


class _Assembly:
    """Puts a trace together again: sites of the chain, counted as often as the model has them."""

    def __init__(self, seen: Trace, always: Ledger) -> None:
        self.seen = seen
        self.always = always
        self.constant = always.polynomial()
        self.sizes = tuple(kind.size for kind in seen.kinds)
        self._site = tuple(kind.site for kind in seen.kinds)
        last = len(seen.sites)
        self.order = (0, *seen.chain, last - 3, last - 2, last - 1)
        self.times = Counter(self.order)
        self.forward_saved = self._totals(seen.forward_saved)
        self.backward_saved = self._totals(seen.backward_saved)
        self.left = self._totals(seen.left)

    # -- candidates ---------------------------------------------------------------------------

    def forward(self) -> Iterator[Moment]:
        """Yield the candidates of the forward pass.

        What earlier sites saved only grows, so of all layers of one kind the last is the highest.
        """
        saved = self.forward_saved
        for site, instants in self.seen.forward:
            position = max(index for index, each in enumerate(self.order) if each == site)
            before = _add(saved[each] for each in self.order[:position])
            here = _add(saved[:site])
            for instant in instants:
                if site == 0:
                    yield self._at_embeddings(instant)
                    continue
                yield self._moment(instant, _shift(instant.total, here, before), position)

    def metrics(self) -> Iterator[Moment]:
        """Yield the candidates between forward and backward: what is saved then, is there."""
        saved = self.backward_saved
        for site, instants in self.seen.metrics:
            position = len(self.order) - 1
            before = _add(saved[each] for each in self.order[:position])
            here = _add(saved[:site])
            for instant in instants:
                yield self._moment(instant, _shift(instant.total, here, before), position)

    def backward(self) -> Iterator[Moment]:
        """Yield the candidates of the backward pass.

        From layer to layer of one kind the same tensors come and go, so the bytes are linear in
        the position and only the ends of each run of equal steps can be the highest.
        """
        saved, left = self.backward_saved, self.left
        for site, instants in self.seen.backward:
            if site == 0:
                yield from map(self._at_embeddings, instants)
                continue
            here = _add((*saved[:site], *left[site + 1 :]))
            for position in self._ends(site):
                before, after = self.order[:position], self.order[position + 1 :]
                around = _add((*(saved[each] for each in before), *(left[each] for each in after)))
                for instant in instants:
                    yield self._moment(instant, _shift(instant.total, here, around), position)

    def _at_embeddings(self, instant: Instant) -> Moment:
        """Return a moment before the first layer: of every layer the same is alive."""
        name = f"{instant.phase}: {self.seen.sites[0]}"
        return self.after(name, instant.live, ZERO, ())

    def after(self, name: str, live: Live, more: Polynomial, extra: tuple[Entry, ...]) -> Moment:
        """Return a moment outside the layers, with what is alive of every site then."""
        left = _add(
            total for site, total in enumerate(self._totals(live)) for _ in range(self.times[site])
        )
        place = _Place(self, live, -1, len(self.order), True, extra)
        return Moment(name, _add((left, more, self.constant)), place)

    def outside(self, name: str, extra: tuple[Entry, ...]) -> Moment:
        """Return a moment between two passes, with what is alive beside the batch."""
        more = polynomial((each.row.size, each.count) for each in extra)
        return self.after(name, self.inputs(), more, extra)

    def inputs(self) -> Live:
        """Return what the loop still has names for: the batch itself, and maybe logits."""
        return {
            kind: count
            for kind, count in self.seen.end.items()
            if self.seen.kinds[kind].component == "buffers" or kind in self.seen.named
        }

    # -- what is alive ------------------------------------------------------------------------

    def alive(self, place: _Place) -> list[Entry]:
        """List what is alive at a place of the assembled step, beside what always is."""
        return [Entry(self.rows[kind], count) for kind, count in self.counts(place).items()]

    def counts(self, place: _Place) -> Live:
        """Count the tensors of each kind that are alive at a place of the assembled step."""
        total: dict[int, int] = {}
        before, after = self._times_around(place)
        held_before, held_after = self._held(place)
        for held, times in ((held_before, before), (held_after, after)):
            for kind, count in held.items():
                total[kind] = total.get(kind, 0) + count * times[self._site[kind]]
        for kind, count in place.live.items():
            repeated = self.times[self._site[kind]] if place.site < 0 else 1
            total[kind] = total.get(kind, 0) + count * repeated
        return {kind: count for kind, count in total.items() if count}

    def _held(self, place: _Place) -> tuple[Live, Live]:
        if place.site < 0:
            return {}, {}
        if place.backward:
            return self.seen.backward_saved, self.seen.left
        return self.seen.forward_saved, {}

    def _times_around(self, place: _Place) -> tuple[list[int], list[int]]:
        """Return how often each site counts before and after, beyond what the chain itself has."""
        before, after = (
            Counter(self.order[: place.position]),
            Counter(self.order[place.position + 1 :]),
        )
        sites = range(len(self.seen.sites))
        return (
            [before[each] - (each < place.site) for each in sites],
            [after[each] - (each > place.site) for each in sites],
        )

    # -- parts --------------------------------------------------------------------------------

    def _moment(self, instant: Instant, total: Polynomial, position: int) -> Moment:
        # What metrics find is what backward begins with.
        place = _Place(self, instant.live, instant.site, position, instant.phase != "forward")
        name = self.seen.sites[instant.site]
        phase = "forward" if instant.phase == "metrics" else instant.phase
        label = f"loss {phase}" if name == "loss" else f"{phase}: {name}"
        return Moment(label, _add((total, self.constant)), place)

    def _ends(self, site: int) -> list[int]:
        """Return the positions of a site where its bytes can be the highest in backward."""
        positions = [index for index, each in enumerate(self.order) if each == site]
        steps = {self.order[a:b] for a, b in pairwise(positions)}
        return [positions[0], positions[-1]] if len(steps) == 1 else positions

    def _totals(self, live: Live) -> list[Polynomial]:
        """Sum what is alive for each site of the chain."""
        split: list[list[tuple[tuple[int, int], int]]] = [[] for _ in self.seen.sites]
        for kind, count in live.items():
            split[self.seen.kinds[kind].site].append((self.sizes[kind], count))
        return [polynomial(each) for each in split]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The ledger row of each kind of tensor."""
        return tuple(
            Row(
                kind.name,
                kind.component,
                self.seen.sites[kind.site],
                kind.size,
                formula(kind.shape, kind.dtype),
                kind.source,
            )
            for kind in self.seen.kinds
        )


def _add(polynomials: Iterable[Polynomial]) -> Polynomial:
    t0, t1, t2, t3, t4, t5, t6, t7 = ZERO
    for a0, a1, a2, a3, a4, a5, a6, a7 in polynomials:
        t0, t1, t2, t3, t4, t5 = t0 + a0, t1 + a1, t2 + a2, t3 + a3, t4 + a4, t5 + a5
        t6, t7 = t6 + a6, t7 + a7
    return (t0, t1, t2, t3, t4, t5, t6, t7)


def _exceeds(total: Polynomial, other: Polynomial) -> bool:
    return total != other and all(map(ge, total, other))


def _shift(total: Polynomial, here: Polynomial, around: Polynomial) -> Polynomial:
    """Replace what the chain holds outside a site by what the real model holds there."""
    h0, h1, h2, h3, h4, h5, h6, h7 = here
    return _add((total, (-h0, -h1, -h2, -h3, -h4, -h5, -h6, -h7), around))
