"""A plain picture of memory over the step: characters for the terminal, SVG for a document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape as escape_markup
from xml.sax.saxutils import quoteattr

from estimator.units import GiB, gib

# Told apart without colour; a component beyond the last one starts again from the first.
MARKS: Final = "#=+:%*o-x&"
# Okabe and Ito's palette (jfly.uni-koeln.de/color), which all kinds of colour vision tell apart.
PALETTE: Final = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip
MIN_WIDTH: Final = 30
MIN_HEIGHT: Final = 5
AXIS_WIDTH: Final = 8  # "999.99 |"

# Escaping does not help these: no XML 1.0 document may hold them (w3.org/TR/xml, section 2.2).
FORBIDDEN_IN_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

SVG_WIDTH: Final = 960
SVG_COLUMNS: Final = 600  # more points than pixels only make the file larger
PLOT_LEFT: Final = 80
PLOT_RIGHT: Final = 700
PLOT_TOP: Final = 50
PLOT_BOTTOM: Final = 400
NUM_TICKS: Final = 5


@dataclass(frozen=True, slots=True)
class Series:
    """Bytes of each component at each moment of the step, in the order of time.

    Args:
        moments: what each moment is called.
        components: bytes for each moment, by component; drawn from the bottom up in this order.

    Raises:
        ValueError: no moments, a component of another length, or a negative size.
    """

    moments: tuple[str, ...]
    components: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.moments or not self.components:
            raise ValueError("a picture needs at least one moment and one component")
        for name, sizes in self.components.items():
            if len(sizes) != len(self.moments):
                raise ValueError(f"{name!r} has {len(sizes)} sizes for {len(self.moments)} moments")
            if min(sizes) < 0:
                raise ValueError(f"{name!r} has a negative size")

    @property
    def totals(self) -> tuple[int, ...]:
        """All components together at each moment [bytes]."""
        return tuple(map(sum, zip(*self.components.values(), strict=True)))

    @property
    def peak(self) -> int:
        """Index of the first moment with the largest total."""
        totals = self.totals
        return totals.index(max(totals))

    @property
    def drawn(self) -> tuple[str, ...]:
        """Components that hold anything at any moment."""
        return tuple(name for name, sizes in self.components.items() if any(sizes))


def terminal(series: Series, width: int = 80, height: int = 16) -> str:
    """Draw stacked characters, no line longer than `width`, the plot `height` lines high.

    Raises:
        ValueError: narrower than 30 columns or lower than 5 lines.
    """
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise ValueError(
            f"a picture of {width} x {height} is too small; it needs {MIN_WIDTH} x {MIN_HEIGHT}"
        )
    columns = _columns(series, width - AXIS_WIDTH, stretch=True)
    top = max(series.totals)
    marks = {name: MARKS[at % len(MARKS)] for at, name in enumerate(series.drawn)}
    stacks = [list(_stack(series, moment)) for moment in columns]
    lines = [*_peak_lines(series, columns, width)]
    for row in range(height, 0, -1):
        middle = (row - 0.5) * top / height
        cells = (_mark_at(stack, middle, marks) for stack in stacks)
        label = _axis_label(row * top / height) if row % 4 == height % 4 else ""
        lines.append(f"{label:6} |{''.join(cells)}".rstrip())
    lines.append(f"   GiB +{'-' * len(columns)}")
    lines.append(_clip(f"{' ' * AXIS_WIDTH}{series.moments[0]} ... {series.moments[-1]}", width))
    lines += (
        _clip(f"{mark} {name} {gib(series.components[name][series.peak])} at the peak", width)
        for name, mark in marks.items()
    )
    return "\n".join(lines)


def svg(series: Series) -> str:
    """Draw stacked areas as one SVG document that needs no script and nothing from outside."""
    columns = _columns(series, SVG_COLUMNS, stretch=False)
    peak_bytes = max(series.totals)
    height = max(PLOT_BOTTOM + 60, PLOT_TOP + 24 * len(series.drawn) + 20)
    title = f"Predicted GPU memory over the step: peak {gib(peak_bytes)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SVG_WIDTH} {height}" '
            'role="img" aria-labelledby="title desc" '
            'font-family="system-ui, sans-serif" font-size="13">',
            f'<title id="title">{_escape(title)}</title>',
            f'<desc id="desc">{_escape(_description(series))}</desc>',
            f'<rect width="{SVG_WIDTH}" height="{height}" fill="#ffffff"/>',
            *_axis(peak_bytes),
            *_areas(series, columns, peak_bytes),
            *_peak_mark(series, columns, peak_bytes),
            *_moment_labels(series),
            *_legend(series),
            "</svg>",
            "",
        ]
    )


def _axis_label(size: float) -> str:
    # Six characters: a cluster's memory has no use for decimals.
    return f"{size / GiB:6.2f}" if size < 1000 * GiB else f"{size / GiB:6.0f}"


def _columns(series: Series, count: int, *, stretch: bool) -> list[int]:
    """Choose the moment that each column shows: the highest of those that fall into it."""
    moments = len(series.moments)
    if moments <= count and not stretch:
        return list(range(moments))
    totals = series.totals
    chosen = []
    for column in range(count):
        first = column * moments // count
        last = max((column + 1) * moments // count, first + 1)
        chosen.append(max(range(first, last), key=totals.__getitem__))
    return chosen


def _stack(series: Series, moment: int) -> Iterator[tuple[str, int, int]]:
    """Yield each drawn component with the bytes below and up to it."""
    below = 0
    for name in series.drawn:
        upto = below + series.components[name][moment]
        yield name, below, upto
        below = upto


def _mark_at(stack: list[tuple[str, int, int]], level: float, marks: Mapping[str, str]) -> str:
    return next((marks[name] for name, below, upto in stack if below <= level < upto), " ")


def _peak_lines(series: Series, columns: list[int], width: int) -> tuple[str, str]:
    totals = series.totals
    column = AXIS_WIDTH + max(range(len(columns)), key=lambda at: totals[columns[at]])
    text = _clip(f"peak {gib(totals[series.peak])} at {series.moments[series.peak]}", width)
    # The label stands over its mark, pushed left where it would run over the edge.
    indent = max(0, min(column, width - len(text)))
    return " " * indent + text, " " * column + "v"


def _escape(text: str) -> str:
    return escape_markup(FORBIDDEN_IN_XML.sub("", text))


def _attribute(text: str) -> str:
    return quoteattr(FORBIDDEN_IN_XML.sub("", text))


def _clip(text: str, width: int) -> str:
    plain = " ".join(text.splitlines())
    return plain if len(plain) <= width else plain[: width - 3] + "..."


def _description(series: Series) -> str:
    peak = series.peak
    parts = ", ".join(f"{name} {gib(series.components[name][peak])}" for name in series.drawn)
    return (
        f"Stacked areas of {len(series.drawn)} components over {len(series.moments)} moments. "
        f"The peak is {gib(series.totals[peak])} at {series.moments[peak]}: {parts}."
    )


def _x(position: float) -> str:
    return f"{PLOT_LEFT + position * (PLOT_RIGHT - PLOT_LEFT):.1f}"


def _y(size: float, top: int) -> str:
    return f"{PLOT_BOTTOM - (size / top if top else 0) * (PLOT_BOTTOM - PLOT_TOP):.1f}"


def _position(column: int, columns: int) -> float:
    return column / (columns - 1) if columns > 1 else 0.5


def _axis(top: int) -> Iterator[str]:
    for tick in range(NUM_TICKS + 1):
        size = top * tick / NUM_TICKS
        y = _y(size, top) if top else _y(tick, NUM_TICKS)
        yield f'<path d="M{PLOT_LEFT} {y}H{PLOT_RIGHT}" stroke="#dddddd"/>'
        yield (
            f'<text x="{PLOT_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{size / GiB:,.2f}</text>'
        )
    yield f'<text x="{PLOT_LEFT - 8}" y="{PLOT_TOP - 18}" text-anchor="end">GiB</text>'


def _areas(series: Series, columns: list[int], top: int) -> Iterator[str]:
    # A single moment is drawn as a bar, which has no width without a second end.
    ends = columns if len(columns) > 1 else columns * 2
    stacks = [list(_stack(series, moment)) for moment in ends]
    for at, name in enumerate(series.drawn):
        positions = [_x(at_column / (len(ends) - 1)) for at_column in range(len(ends))]
        lower = [_y(stack[at][1], top) for stack in stacks]
        upper = [_y(stack[at][2], top) for stack in stacks]
        forth = [f"{x},{y}" for x, y in zip(positions, upper, strict=True)]
        back = [f"{x},{y}" for x, y in zip(positions, lower, strict=True)]
        yield (
            f'<polygon points="{" ".join(forth + back[::-1])}" fill="{PALETTE[at % len(PALETTE)]}" '
            f'stroke="#ffffff" stroke-width="0.5" data-component={_attribute(name)}/>'
        )


def _peak_mark(series: Series, columns: list[int], top: int) -> Iterator[str]:
    totals = series.totals
    column = max(range(len(columns)), key=lambda at: totals[columns[at]])
    position = _position(column, len(columns))
    anchor = "end" if position > 0.6 else "start" if position < 0.4 else "middle"
    text = _escape(f"peak {gib(top)} at {series.moments[series.peak]}")
    yield (
        f'<path d="M{_x(position)} {PLOT_TOP - 6}V{PLOT_BOTTOM}" stroke="#000000" '
        'stroke-dasharray="4 3"/>'
    )
    yield (
        f'<text x="{_x(position)}" y="{PLOT_TOP - 12}" text-anchor="{anchor}" '
        f'font-weight="bold">{text}</text>'
    )


def _moment_labels(series: Series) -> Iterator[str]:
    ends = ((PLOT_LEFT, "start", series.moments[0]), (PLOT_RIGHT, "end", series.moments[-1]))
    for x, anchor, moment in ends:
        label = _escape(moment)
        yield f'<text x="{x}" y="{PLOT_BOTTOM + 22}" text-anchor="{anchor}">{label}</text>'


def _legend(series: Series) -> Iterator[str]:
    names = list(enumerate(series.drawn))
    # From the top down, as the areas lie.
    for row, (at, name) in enumerate(reversed(names)):
        y = PLOT_TOP + 24 * row
        label = _escape(f"{name} {gib(series.components[name][series.peak])}")
        yield (
            f'<rect x="{PLOT_RIGHT + 20}" y="{y}" width="14" height="14" '
            f'fill="{PALETTE[at % len(PALETTE)]}"/>'
        )
        yield f'<text x="{PLOT_RIGHT + 42}" y="{y + 12}">{label}</text>'
