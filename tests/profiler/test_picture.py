"""The picture of memory over the step: what a reader, a parser and a narrow terminal see."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.units import GiB
from profiler.picture import MIN_HEIGHT, MIN_WIDTH, PALETTE, Series, svg, terminal

SVG = "{http://www.w3.org/2000/svg}"
STEP = Series(
    ("load", "forward", "loss backward", "optimizer step"),
    {
        "weights": (14 * GiB, 14 * GiB, 14 * GiB, 14 * GiB),
        "gradients": (0, 0, 4 * GiB, 14 * GiB),
        "activations": (0, 10 * GiB, 24 * GiB, 0),
        "buffers": (0, 0, 0, 0),
    },
)


TEXT = st.text(max_size=40)


@st.composite
def series(draw: st.DrawFn) -> Series:
    moments = draw(st.lists(TEXT, min_size=1, max_size=40))
    names = draw(st.lists(TEXT, min_size=1, max_size=11, unique=True))
    top = draw(st.sampled_from([0, 1, 80 * GiB, 900 * GiB]))
    sizes = st.tuples(*(st.integers(0, top) for _ in moments))
    return Series(tuple(moments), {name: draw(sizes) for name in names})


def test_the_terminal_picture_reads_as_drawn_by_hand() -> None:
    # 42 GiB over six rows: each row stands for 7 GiB and shows what lies in its middle.
    assert terminal(STEP, width=32, height=6).splitlines() == [
        " peak 42.00 GiB at loss backward",
        "                    v",
        " 42.00 |            ++++++",
        "       |            ++++++",
        "       |            ++++++======",
        "       |      ++++++============",
        " 14.00 |########################",
        "       |########################",
        "   GiB +------------------------",
        "        load ... optimizer step",
        "# weights 14.00 GiB at the peak",
        "= gradients 4.00 GiB at the peak",
        "+ activations 24.00 GiB at th...",
    ]


def test_stacks_lie_in_the_order_of_the_components() -> None:
    rows = terminal(STEP, width=48, height=21).splitlines()[2:23]
    column = 8 + 25  # in the third quarter: loss backward
    assert "".join(row[column] for row in rows) == "+" * 12 + "=" * 2 + "#" * 7


def test_the_peak_is_named_and_marked_above_its_column() -> None:
    lines = terminal(STEP, width=60, height=10).splitlines()
    assert "peak 42.00 GiB at loss backward" in lines[0]
    mark = lines[1].index("v")
    assert lines[2][mark] == "+"
    assert lines[2][mark - 1] == " "


def test_the_legend_names_what_is_alive_and_leaves_out_what_never_is() -> None:
    picture = terminal(STEP, width=60, height=10)
    assert "# weights 14.00 GiB at the peak" in picture
    assert "buffers" not in picture


def test_a_single_high_moment_survives_in_a_narrow_picture() -> None:
    spike = Series(
        tuple(str(at) for at in range(10_000)),
        {"activations": tuple(GiB * (9 if at == 7_777 else 1) for at in range(10_000))},
    )
    lines = terminal(spike, width=MIN_WIDTH, height=9).splitlines()
    assert "9.00 GiB at 7777" in lines[0]
    assert lines[2].count("#") == 1
    assert "peak 9.00 GiB at 7777" in svg(spike)


@settings(max_examples=40)
@given(series(), st.integers(MIN_WIDTH, 120), st.integers(MIN_HEIGHT, 30))
def test_no_line_is_longer_than_the_width(series: Series, width: int, height: int) -> None:
    lines = terminal(series, width, height).split("\n")
    assert max(map(len, lines)) <= width
    assert len(lines) == 2 + height + 2 + len(series.drawn)


@settings(max_examples=40)
@given(series())
def test_the_svg_is_well_formed_whatever_the_names_hold(series: Series) -> None:
    root = ET.fromstring(svg(series))
    assert len(root.findall(f"{SVG}polygon")) == len(series.drawn)


def test_the_svg_is_self_contained_and_speaks_to_a_screen_reader() -> None:
    hostile = Series(('<script>alert("x")</script>',), {"a&b\"'<": (GiB,)})
    document = svg(hostile)
    root = ET.fromstring(document)
    assert {child.tag.removeprefix(SVG) for child in root.iter()} <= {
        "svg", "title", "desc", "rect", "path", "text", "polygon",
    }  # fmt: skip
    assert "href" not in document
    assert "url(" not in document
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "title desc"
    assert "1.00 GiB" in (root.findtext(f"{SVG}title") or "")
    assert "script" in (root.findtext(f"{SVG}desc") or "")


def test_the_svg_marks_the_peak_and_labels_the_axis_in_gib() -> None:
    texts = [node.text for node in ET.fromstring(svg(STEP)).iter(f"{SVG}text")]
    assert "peak 42.00 GiB at loss backward" in texts
    assert {"GiB", "0.00", "42.00", "load", "optimizer step"} <= set(texts)


def test_areas_stack_without_gap_or_overlap() -> None:
    polygons = ET.fromstring(svg(STEP)).findall(f"{SVG}polygon")
    edges = []
    for polygon in polygons:
        points = polygon.attrib["points"].split(" ")
        half = len(points) // 2
        edges.append((points[:half], points[half:][::-1]))
    for (upper, _), (_, lower) in pairwise(edges):
        assert upper == lower


def test_the_palette_is_okabe_and_ito_s() -> None:
    # Okabe and Ito, "Color Universal Design", jfly.uni-koeln.de/color: the seven hues.
    hues = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert hues <= set(PALETTE)


def test_two_drawings_of_one_series_are_identical() -> None:
    assert svg(STEP) == svg(STEP)
    assert terminal(STEP) == terminal(STEP)


@pytest.mark.parametrize(
    ("moments", "components"),
    [((), {"weights": ()}), (("load",), {}), (("load",), {"weights": ()}),
     (("load",), {"weights": (-1,)})],
)  # fmt: skip
def test_a_series_that_cannot_be_drawn_is_refused(
    moments: tuple[str, ...], components: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError, match=r"needs|sizes|negative"):
        Series(moments, components)


@pytest.mark.parametrize(("width", "height"), [(MIN_WIDTH - 1, 10), (80, MIN_HEIGHT - 1)])
def test_a_picture_too_small_to_read_is_refused(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="too small"):
        terminal(STEP, width, height)
