"""Bars of bytes as percentages of a drawing's width: the only arithmetic of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from estimator.result import COMPONENTS, Result, WaterfallStep
from estimator.units import GiB, gib

# What the driver counts beside the allocated tensors; drawn after the components.
OUTSIDE: Final = "outside"
_MOST_TICKS: Final = 8
# Room to the right of the widest thing drawn, so that its line and label are not cut off.
_MARGIN: Final = 1.04


@dataclass(frozen=True, slots=True)
class Segment:
    """One component's part of a bar; `x` and `width` are in percent of the drawing."""

    component: str
    label: str
    bytes: int
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One stacked bar."""

    label: str
    bytes: int
    is_peak: bool
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across the drawing, or a tick below it, at `x` percent."""

    label: str
    bytes: int
    x: float


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars on one scale, with the card's capacity and the predicted range on the same scale."""

    name: str
    scale_bytes: int
    bars: tuple[Bar, ...]
    ticks: tuple[Mark, ...]
    capacity: Mark | None
    low: Mark | None
    high: Mark | None

    def data(self) -> dict[str, Any]:
        """Return what the interactive chart draws: the same numbers, in bytes."""
        return {
            "scale": self.scale_bytes,
            "bars": [
                {
                    "label": bar.label,
                    "peak": bar.is_peak,
                    "segments": [
                        {
                            "component": segment.component,
                            "label": segment.label,
                            "bytes": segment.bytes,
                            "text": gib(segment.bytes),
                        }
                        for segment in bar.segments
                    ],
                }
                for bar in self.bars
            ],
            "ticks": [{"bytes": tick.bytes, "label": tick.label} for tick in self.ticks],
            "capacity": _plain(self.capacity),
            "low": _plain(self.low),
            "high": _plain(self.high),
        }


def _plain(mark: Mark | None) -> dict[str, Any] | None:
    return None if mark is None else {"bytes": mark.bytes, "label": mark.label}


def peak_chart(result: Result) -> Chart:
    """Return the peak as one bar, with what lies outside the tensors, against the card's memory."""
    parts: dict[str, int] = {part.component: part.bytes for part in result.breakdown}
    parts[OUTSIDE] = sum(row.bytes for row in result.outside)
    needed = result.peak.needed_bytes
    usable = result.capacity.usable_bytes
    scale = round(max(needed.high, usable or 0, sum(parts.values()), 1) * _MARGIN)
    capacity = None
    if usable is not None:
        capacity = _mark(f"usable: {gib(usable)}", usable, scale)
    return Chart(
        name="peak",
        scale_bytes=scale,
        bars=(_bar(result.peak.moment, parts, scale, is_peak=True),),
        ticks=_ticks(scale),
        capacity=capacity,
        low=_mark(f"needed, low: {gib(needed.low)}", needed.low, scale),
        high=_mark(f"needed, high: {gib(needed.high)}", needed.high, scale),
    )


def timeline_chart(result: Result) -> Chart:
    """Return one bar for each moment of the step, in the order of the step."""
    largest = max((moment.bytes for moment in result.timeline), default=1)
    scale = round(max(largest, 1) * _MARGIN)
    return Chart(
        name="timeline",
        scale_bytes=scale,
        bars=tuple(
            _bar(
                moment.moment,
                moment.components,
                scale,
                is_peak=moment.moment == result.peak.moment,
            )
            for moment in result.timeline
        ),
        ticks=_ticks(scale),
        capacity=None,
        low=None,
        high=None,
    )


def component_label(component: str) -> str:
    """Return a component's name as people read it."""
    if component == OUTSIDE:
        return "beside the tensors"
    return component.replace("_", " ")


def _bar(label: str, parts: Mapping[Any, int], scale: int, *, is_peak: bool) -> Bar:
    segments = []
    start = 0
    for component in (*COMPONENTS, OUTSIDE):
        size = parts.get(component, 0)
        if size > 0:
            segments.append(
                Segment(
                    component=component,
                    label=component_label(component),
                    bytes=size,
                    x=_percent(start, scale),
                    width=_percent(size, scale),
                )
            )
            start += size
    return Bar(label, start, is_peak, tuple(segments))


def _mark(label: str, size: int, scale: int) -> Mark:
    return Mark(label, size, _percent(size, scale))


def _percent(size: int, scale: int) -> float:
    return round(100 * size / scale, 3)


def _ticks(scale: int) -> tuple[Mark, ...]:
    """Return at most eight ticks at round sizes."""
    step = GiB // 1024
    while scale // step > _MOST_TICKS:
        step *= 2
    return tuple(
        _mark(f"{size // GiB} GiB" if step >= GiB else f"{size * 1024 // GiB} MiB", size, scale)
        for size in range(0, scale, step)
    )


@dataclass(frozen=True, slots=True)
class Fall:
    """One step of the waterfall: its widths are in percent of the drawing.

    Args:
        needed: the width of what the run needs with this technique.
        saved: the width of what the technique took away, drawn behind it.
    """

    step: WaterfallStep
    needed: float
    saved: float


def waterfall_bars(result: Result) -> tuple[Fall, ...]:
    """Return a bar for each step of the waterfall, all on one scale."""
    steps = result.waterfall
    whole = max((step.needed_bytes + max(step.saves_bytes, 0) for step in steps), default=0)
    scale = 100 / whole if whole else 0.0
    return tuple(
        Fall(
            step,
            round(step.needed_bytes * scale, 3),
            round(max(step.saves_bytes, 0) * scale, 3),
        )
        for step in steps
    )
