"""From moments to the rows of a document: what is alive at the peak, and around it."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from estimator.calibration import HANDLES, DeviceConstants
from estimator.components import COMPONENTS, Component
from estimator.eager.size import Polynomial, evaluate
from estimator.memory.ledger import Entry, Ledger, Row, constant_row
from estimator.memory.timeline import Moment
from estimator.result import ComponentRows, MomentBytes, Range, ResultRow, RunnerUp
from estimator.sources import Assumption, Cite

_ROUNDING: Final = Cite("torch-allocator", "round_size, get_allocation_size and should_split")
_MANAGED: Final = "bitsandbytes: optim/optimizer.py, get_state_buffer"


class Highest(Struct, frozen=True):
    """The highest instant of a named moment, and what block sizes add to it [bytes]."""

    moment: Moment
    rounding: int


class View(Struct, frozen=True):
    """How moments look at one micro-batch and length on one kind of device.

    Args:
        at: powers of the micro-batch and length.
        numbers: the micro-batch, the length and the second length themselves.
        handles: threads that multiply, each with a cuBLAS workspace of its own.
    """

    at: Polynomial
    numbers: tuple[int, int, int]
    constants: DeviceConstants
    handles: int = HANDLES

    def allocated(self, highest: Highest) -> int:
        """Bytes of the blocks that are handed out at a moment, library workspaces included."""
        fixed = self._handles(highest) * self.constants.cublas_workspace
        return highest.moment.bytes_at(self.at) + highest.rounding + fixed

    def _handles(self, highest: Highest) -> int:
        return self.handles if highest.moment.multiplies else 0

    def runner_up(self, moments: tuple[Highest, ...], peak: Highest) -> RunnerUp | None:
        """Return the second highest moment and how far it lies below the peak."""
        others = [each for each in moments if each is not peak]
        if not others:
            return None
        second = max(others, key=self.allocated)
        return RunnerUp(second.moment.name, self.allocated(peak) - self.allocated(second))

    def breakdown(self, peak: Highest) -> tuple[ComponentRows, ...]:
        """Return the rows that are alive at a moment by component, largest first."""
        rows: dict[str, list[ResultRow]] = {}
        numbers = _numbers(*self.numbers)
        for entry in _merged(peak.moment.alive.plus(*self._overhead(peak))):
            size = self._size(entry)
            if size == 0:
                continue
            row = entry.row
            rows.setdefault(row.component, []).append(
                ResultRow(
                    name=row.name,
                    site=row.site,
                    count=entry.count,
                    bytes=size * entry.count,
                    formula=_with_numbers(row.formula, entry.count, numbers),
                    source=str(row.source),
                    basis=row.basis,
                )
            )
        return tuple(
            ComponentRows(
                component,
                sum(each.bytes for each in rows[component]),
                tuple(sorted(rows[component], key=lambda row: (-row.bytes, row.name, row.site))),
            )
            for component in COMPONENTS
            if component in rows
        )

    def timeline(self, moments: tuple[Highest, ...]) -> tuple[MomentBytes, ...]:
        """Return each named moment with its bytes by component, in the order of time."""
        timeline = []
        for each in moments:
            components: dict[Component, int] = dict.fromkeys(COMPONENTS, 0)
            components.update(each.moment.standing.constant_components)
            for component, size in each.moment.components:
                components[component] += evaluate(size, self.at)
            for entry in self._overhead(each):
                components[entry.row.component] += self._size(entry) * entry.count
            shown: dict[str, int] = {key: value for key, value in components.items() if value}
            timeline.append(MomentBytes(each.moment.name, sum(shown.values()), shown))
        return tuple(timeline)

    def _overhead(self, highest: Highest) -> tuple[Entry, Entry]:
        """Return the library workspaces and the block rounding of a moment."""
        workspace, source = self.constants.cublas_workspace, self.constants.cublas_source
        formula = "blocks handed out - bytes requested"
        return (
            Entry(
                constant_row(
                    "cuBLAS workspace", "workspace", "process", workspace, f"{workspace} B", source
                ),
                self._handles(highest),
            ),
            Entry(
                constant_row(
                    "allocator rounding", "runtime", "process", highest.rounding, formula, _ROUNDING
                ),
                1,
            ),
        )

    def _size(self, entry: Entry) -> int:
        coefficient, index = entry.row.size
        return coefficient * self.at[index]


def _merged(ledger: Ledger) -> list[Entry]:
    """Add up the entries of one row: the first, the inner and the last layers hold the same."""
    counts: dict[Row, int] = {}
    for each in ledger.entries:
        counts[each.row] = counts.get(each.row, 0) + each.count
    return [Entry(row, count) for row, count in counts.items() if count]


_Numbers = tuple[tuple[str, str], ...]


def _numbers(b: int, s: int, t: int = 0) -> _Numbers:
    """Return what stands in formulas for the request's numbers, and what takes its place."""
    return tuple(
        (f"{before}{letter}{after}", f"{before}{letter}={value}{after}")
        for letter, value in (("b", b), ("s", s), ("t", t))
        for before, after in (("[", ","), ("[", "]"), (" ", ","), (" ", "]"))
    )


def _with_numbers(formula: str, count: int, numbers: _Numbers) -> str:
    """Put the request's numbers into a row's formula.

    Example:
        >>> _with_numbers("[b, s, h=4096] x 2 B", 32, _numbers(4, 2048))
        '32 x [b=4, s=2048, h=4096] x 2 B'
    """
    filled = formula
    for letter, value in numbers:
        filled = filled.replace(letter, value)
    return f"{count} x {filled}" if count != 1 else filled


def outside(
    allocated: Range, reserved: Range, constants: DeviceConstants, managed: int
) -> tuple[ResultRow, ...]:
    """Return what lies between the allocated bytes and what the driver shows as used."""
    rows = [
        ResultRow(
            "reserved by the allocator, not allocated", "process", 1,
            reserved.expected - allocated.expected, "segments held - blocks handed out at the peak",
            str(_ROUNDING), "formula",
        ),
        ResultRow(
            "CUDA context and loaded kernels", "process", 1, constants.context.expected,
            "constant of the architecture", str(constants.context_source), "assumed",
        ),
    ]  # fmt: skip
    if managed:
        rows.append(
            ResultRow(
                "paged optimizer states", "process", 1, managed, "CUDA managed memory", _MANAGED,
                "formula",
            )
        )  # fmt: skip
    return tuple(rows)


def assumptions(moment: Moment) -> tuple[str, ...]:
    """Return the reason behind every row of a moment that has no source."""
    reasons = [
        each.row.source.reason
        for each in moment.alive.entries
        if isinstance(each.row.source, Assumption)
    ]
    return tuple(dict.fromkeys(reasons))
