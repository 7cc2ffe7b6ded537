"""Ledger rows: one kind of tensor each, with what it is, where it lives and who says so."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from msgspec import Struct

from estimator.components import Basis, Component
from estimator.dtypes import DType
from estimator.eager.size import BATCH, SECOND, SEQ, ZERO, Polynomial, Shape, elements
from estimator.memory.allocator import charge
from estimator.sources import Assumption, Cite


class Row(NamedTuple):
    """One kind of tensor; how many of them are alive is said beside it, not in it.

    Args:
        name: what it is, with its place in the model.
        component: weights, gradients, optimizer_states, activations, buffers, workspace, runtime.
        site: where in the step it lives.
        size: bytes of one such tensor: (coefficient, index of its monomial in b, s and t).
        formula: the size in letters: dimensions and width.
        source: a citation, or the reason of an assumption.
    """

    name: str
    component: Component
    site: str
    size: tuple[int, int]
    formula: str
    source: Cite | Assumption

    @property
    def basis(self) -> Basis:
        """Whether the row is a formula or an assumption."""
        return "assumed" if isinstance(self.source, Assumption) else "formula"


class Entry(Struct, frozen=True):
    """A row and how many of its tensors are alive."""

    row: Row
    count: int


class Ledger(Struct, frozen=True, dict=True):
    """Entries that are alive together."""

    entries: tuple[Entry, ...]

    def plus(self, *others: Entry) -> Ledger:
        """Return the ledger with more entries."""
        return Ledger((*self.entries, *others))

    def polynomial(self) -> Polynomial:
        """Return the sum of all entries as a polynomial in b, s and t."""
        return polynomial((each.row.size, each.count) for each in self.entries)

    def less_dropped(self) -> Ledger:
        """Return the ledger without what entries of a negative count take away."""
        dropped: dict[Row, int] = {}
        for each in self.entries:
            if each.count < 0:
                dropped[each.row] = dropped.get(each.row, 0) - each.count
        if not dropped:
            return self
        left = []
        for each in self.entries:
            taken = min(dropped.get(each.row, 0), each.count) if each.count > 0 else 0
            if taken:
                dropped[each.row] -= taken
            if each.count > taken:
                left.append(Entry(each.row, each.count - taken))
        return Ledger(tuple(left))

    @cached_property
    def growing(self) -> tuple[Entry, ...]:
        """The entries whose sizes depend on the batch."""
        return tuple(each for each in self.entries if each.row.size[1])

    @cached_property
    def _constant(self) -> tuple[Entry, ...]:
        return tuple(each for each in self.entries if not each.row.size[1])

    @cached_property
    def constant_charge(self) -> int:
        """Bytes of the blocks of the entries whose sizes do not depend on the batch."""
        return sum(charge(each.row.size[0]) * each.count for each in self._constant)

    @cached_property
    def constant_components(self) -> dict[Component, int]:
        """Bytes by component of the entries whose sizes do not depend on the batch."""
        total: dict[Component, int] = {}
        for each in self._constant:
            row = each.row
            total[row.component] = total.get(row.component, 0) + row.size[0] * each.count
        return total


def polynomial(sizes: Iterable[tuple[tuple[int, int], int]]) -> Polynomial:
    """Sum monomials, each given as ((coefficient, index), count)."""
    total = [0] * len(ZERO)
    for (coefficient, index), count in sizes:
        total[index] += coefficient * count
    t0, t1, t2, t3, t4, t5, t6, t7 = total
    return (t0, t1, t2, t3, t4, t5, t6, t7)


def tensor_row(
    name: str,
    component: Component,
    site: str,
    shape: Shape,
    dtype: DType,
    source: Cite | Assumption,
) -> Row:
    """Return the row of tensors of one shape and type."""
    count, index = elements(shape)
    size = (count * dtype.width, index)
    return Row(name, component, site, size, formula(shape, dtype), source)


def formula(shape: Shape, dtype: DType) -> str:
    """Write a tensor's size with the numbers that the model fixes, b, s and t as letters.

    Example:
        >>> from estimator.eager.size import dim
        >>> formula((BATCH, SEQ, dim("h", 4096)), DType.BFLOAT16)
        '[b, s, h=4096] x 2 B'
    """
    dims = ", ".join(
        each.letter
        if each in (BATCH, SEQ, SECOND) or each.letter == "1"
        else f"{each.letter}={each.value}"
        for each in shape
    )
    return f"[{dims}] x {dtype.width} B"


def constant_row(
    name: str, component: Component, site: str, size: int, formula: str, source: Cite | Assumption
) -> Row:
    """Return the row of something whose size does not depend on the batch."""
    return Row(name, component, site, (size, 0), formula, source)
