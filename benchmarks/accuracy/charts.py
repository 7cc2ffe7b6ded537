"""The pictures of the accuracy page, as SVG; the same points give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import log10
from typing import Final

from benchmarks.accuracy.points import Point
from benchmarks.accuracy.ranges import Coverage
from benchmarks.accuracy.summary import grouped
from estimator.units import GiB

# A palette that colour-blind readers can tell apart; each has a shape of its own as well.
COLOURS: Final = {"allocated": "#0072b2", "reserved": "#d55e00", "device-used": "#009e73"}
FONT: Final = 'font-family="sans-serif" font-size="12"'
LEFT, RIGHT, TOP, ROW = 270, 30, 34, 26
WIDTH: Final = 820
LIMIT: Final = 0.30
"""Errors beyond it are drawn at the edge."""


def error_chart(points: Sequence[Point]) -> str:
    """Return one line of marks for each source and meter, by signed error."""
    groups = grouped(points)
    bottom = TOP + ROW * len(groups)

    def x(error: float) -> float:
        share = (max(-LIMIT, min(LIMIT, error)) + LIMIT) / (2 * LIMIT)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    body = [
        f'<rect x="{x(-0.05):.1f}" y="{TOP}" width="{x(0.05) - x(-0.05):.1f}" '
        f'height="{bottom - TOP}" fill="#e8eef4"/>',
        *_vertical(x, bottom),
    ]
    for line, ((group, meter), each) in enumerate(groups.items()):
        y = TOP + ROW * line + ROW / 2
        body.append(f'<text x="8" y="{y + 4:.1f}" {FONT}>{escape(group)}, {meter}</text>')
        body += [_mark(meter, x(point.error), y, point.error) for point in each]
    body.append(
        f'<text x="{LEFT}" y="{bottom + 34}" {FONT}>estimated against measured; '
        "the band is 5 % either way</text>"
    )
    title = "Signed error of every published reading, by source and meter"
    return _svg(title, WIDTH, bottom + 46, body)


def _vertical(x: object, bottom: int) -> Iterator[str]:
    assert callable(x)
    for percent in range(-30, 31, 10):
        at = x(percent / 100)
        yield (
            f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}" '
            f'stroke="{"#555" if percent == 0 else "#ccc"}"/>'
        )
        yield (
            f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle" {FONT}>'
            f"{percent:+d} %</text>"
        )


def _mark(meter: str, x: float, y: float, error: float) -> str:
    colour, title = COLOURS[meter], f"<title>{error:+.2%}</title>"
    style = f'fill="{colour}" fill-opacity="0.55"'
    if meter == "allocated":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}>{title}</circle>'
    if meter == "reserved":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}>{title}</rect>'
    corners = f"{x:.1f},{y - 5:.1f} {x + 5:.1f},{y + 4:.1f} {x - 5:.1f},{y + 4:.1f}"
    return f'<polygon points="{corners}" {style}>{title}</polygon>'


SIDE: Final = 420
EDGE: Final = 60


def scatter_chart(points: Sequence[Point]) -> str:
    """Return estimated over measured bytes of every reading, both on a logarithmic scale."""
    values = [value for point in points for value in (point.measured, point.estimated.expected)]
    low, high = log10(min(values) / GiB) - 0.05, log10(max(values) / GiB) + 0.05

    def at(size: float) -> float:
        return (log10(size / GiB) - low) / (high - low) * (SIDE - EDGE - 20)

    body = [
        f'<line x1="{EDGE}" y1="{SIDE - EDGE}" x2="{SIDE - 20}" y2="20" stroke="#555"/>',
        f'<text x="{SIDE / 2}" y="{SIDE - 16}" text-anchor="middle" {FONT}>measured, GiB</text>',
        f'<text x="14" y="{SIDE / 2}" transform="rotate(-90 14 {SIDE / 2})" '
        f'text-anchor="middle" {FONT}>estimated, GiB</text>',
    ]
    for gib in (2, 5, 10, 20, 50, 100):
        if low <= log10(gib) <= high:
            across, up = EDGE + at(gib * GiB), SIDE - EDGE - at(gib * GiB)
            body += [
                f'<line x1="{across:.1f}" y1="20" x2="{across:.1f}" y2="{SIDE - EDGE}" '
                'stroke="#ddd"/>',
                f'<line x1="{EDGE}" y1="{up:.1f}" x2="{SIDE - 20}" y2="{up:.1f}" stroke="#ddd"/>',
                f'<text x="{across:.1f}" y="{SIDE - EDGE + 16}" text-anchor="middle" {FONT}>'
                f"{gib}</text>",
                f'<text x="{EDGE - 6}" y="{up + 4:.1f}" text-anchor="end" {FONT}>{gib}</text>',
            ]
    body += [
        _mark(
            point.meter,
            EDGE + at(point.measured),
            SIDE - EDGE - at(point.estimated.expected),
            point.error,
        )
        for point in points
    ]
    body += _legend()
    return _svg("Estimated against measured memory", SIDE, SIDE, body)


def _legend() -> Iterator[str]:
    for line, meter in enumerate(COLOURS):
        y = 34 + 18 * line
        yield _mark(meter, EDGE + 14, y, 0.0).replace("<title>+0.00%</title>", "")
        yield f'<text x="{EDGE + 26}" y="{y + 4}" {FONT}>{meter}</text>'


def coverage_chart(covered: Sequence[Coverage]) -> str:
    """Return the share of held-out readings inside their ranges over the confidence asked for."""

    def across(share: float) -> float:
        return EDGE + (share - 0.5) / 0.5 * (SIDE - EDGE - 20)

    def up(share: float) -> float:
        return SIDE - EDGE - (share - 0.5) / 0.5 * (SIDE - EDGE - 20)

    body = [
        f'<line x1="{across(0.5):.1f}" y1="{up(0.5):.1f}" x2="{across(1.0):.1f}" '
        f'y2="{up(1.0):.1f}" stroke="#555" stroke-dasharray="4 3"/>',
        f'<text x="{SIDE / 2}" y="{SIDE - 16}" text-anchor="middle" {FONT}>'
        "confidence asked for</text>",
        f'<text x="14" y="{SIDE / 2}" transform="rotate(-90 14 {SIDE / 2})" '
        f'text-anchor="middle" {FONT}>held-out readings inside</text>',
    ]
    for percent in (50, 60, 70, 80, 90, 100):
        share = percent / 100
        body += [
            f'<text x="{across(share):.1f}" y="{SIDE - EDGE + 16}" text-anchor="middle" {FONT}>'
            f"{percent} %</text>",
            f'<text x="{EDGE - 6}" y="{up(share) + 4:.1f}" text-anchor="end" {FONT}>'
            f"{percent} %</text>",
        ]
    body += [
        f'<circle cx="{across(each.confidence):.1f}" cy="{up(max(0.5, each.share)):.1f}" r="5" '
        f'fill="#0072b2"><title>{each.share:.1%} at {each.confidence:.1%}</title></circle>'
        for each in covered
    ]
    return _svg("Coverage of ranges on sources that were left out", SIDE, SIDE, body)


def _svg(title: str, width: int, height: int, body: Sequence[str]) -> str:
    lines = "\n".join(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        f'<text x="8" y="18" {FONT} font-weight="bold">{escape(title)}</text>\n{lines}\n</svg>\n'
    )
