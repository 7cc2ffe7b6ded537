"""What a person sees: verdict first, rows that add up, on any width and without surprises."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from estimator.render.explain import to_explanation
from estimator.render.text import Page, printable, to_line, to_text
from estimator.result import Capacity, Limits, Parameters, Range


def _rows(text: str) -> list[tuple[str, int]]:
    """Return the labelled byte counts of the breakdown as they are printed."""
    found = re.findall(r"^ *(.+?)  +((?:\d{1,3} )*\d{1,3})  +[\d,.]+ GiB", text, re.MULTILINE)
    return [(name.strip(), int(count.replace(" ", ""))) for name, count in found]


def test_the_verdict_sentence_comes_first(result):
    assert to_text(result).splitlines()[0] == result.message


def test_counts_are_grouped_by_spaces(result):
    lines = to_text(result).splitlines()
    assert "parameters  8 030 261 248" in lines
    assert "trainable   8 030 261 248 (100.0 %)" in lines


def test_active_parameters_are_shown_where_they_differ(result):
    mixture = replace(result, parameters=Parameters(30_532_122_624, 0, 3_300_000_000))
    assert "30 532 122 624 · active 3 300 000 000" in to_text(mixture)


def test_the_printed_rows_add_up_to_the_printed_sum(result):
    rows = _rows(to_text(result, Page(width=100)))
    components = {component.component.replace("_", " ") for component in result.breakdown}
    (whole,) = (size for name, size in rows if name.startswith("sum"))
    assert sum(size for name, size in rows if name in components) == whole
    details = (
        size for name, size in rows if name not in components | {"sum = device-used, expected"}
    )
    assert sum(details) == whole


def test_the_sum_says_which_quantity_it_is(result):
    assert "sum = device-used, expected" in to_text(result, Page(width=100))


def test_small_rows_are_counted_together(result):
    assert ("4 smaller rows", 3_175_620_608) in _rows(to_text(result))


def test_a_quantity_that_nobody_models_is_a_dash(result):
    unknown = replace(result, peak=replace(result.peak, host_bytes=Range(0, 0, 0)))
    assert re.search(r"^ *host +- +- +-$", to_text(unknown), re.MULTILINE)


@pytest.mark.parametrize("quantity", ["allocated", "reserved", "device-used", "host"])
def test_each_quantity_has_low_expected_and_high(result, quantity):
    line = next(line for line in to_text(result).splitlines() if line.strip().startswith(quantity))
    assert line.count("GiB") == 3


def test_the_peak_moment_is_marked_in_the_timeline(result):
    marked = [line for line in to_text(result).splitlines() if line.endswith(" peak")]
    assert len(marked) == 1
    assert marked[0].startswith("optimizer step")


def test_bars_are_as_long_as_their_moments(result):
    bars = [line.count("█") for line in to_text(result).splitlines() if "█" in line]
    assert bars == sorted(bars)
    assert len(bars) == 3


def test_zero_is_said_in_words_in_the_limits(result):
    assert "largest micro-batch  not even 1 (at 2048 tokens)" in to_text(result)
    assert "smallest GPU         a100-80gb-sxm" in to_text(result)


def test_limits_without_a_gpu_leave_their_heading_out(result):
    unjudged = replace(
        result, limits=Limits(None, None, None, None), capacity=Capacity(None, None, "")
    )
    assert "What fits" not in to_text(unjudged)
    assert "usable" not in to_text(unjudged)


def test_three_suggestions_say_saving_price_and_verdict(result):
    text = to_text(result)
    assert "1. train QLoRA adapters" in text
    assert "saves 50.00 GiB · changes training · then it fits" in text
    assert "the fourth idea" not in text


@pytest.mark.parametrize(
    "line",
    [
        "-  optimizer: adamw, the default",
        "-  attention sdpa picks flash attention here",
        "-  evaluation",
    ],
)
def test_assumptions_notes_and_gaps_are_listed(result, line):
    assert f"  {line}" in to_text(result).splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("render", [to_text, to_explanation])
def test_no_line_is_wider_than_the_page(result, width, render):
    assert max(map(len, render(result, Page(width=width)).splitlines())) <= width


def test_sizes_are_whole_at_sixty_columns(result):
    rows = _rows(to_text(result, Page(width=60)))
    assert ("weights", result.breakdown[0].bytes) in rows


def test_a_plain_page_holds_no_escapes(result):
    assert "\x1b" not in to_text(result)
    assert "\x1b[" in to_text(result, Page(colour=True))


def test_an_ascii_page_holds_only_ascii(result):
    page = Page(unicode=False)
    assert (to_text(result, page) + to_explanation(result, page)).isascii()
    assert "?" not in to_text(result, page)


@pytest.mark.parametrize(
    "hostile", ["\x1b]0;owned\x07", "\x9b31m", "\u202egnp.exe", "\r", "\udc80", "[bold red]"]
)
def test_a_hostile_model_name_stays_text(result, hostile):
    text = to_text(replace(result, model=f"x{hostile}y", message=f"{hostile} fits"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\udc80]", text)
    assert hostile != "[bold red]" or "x[bold red]y" in text


def test_the_quiet_line_is_one_line(result):
    long = replace(result, message="a fits " * 40 + "\nsecond")
    assert to_line(long).count("\n") == 1


def test_printable_keeps_other_scripts():
    assert printable("模型-7B é") == "模型-7B é"


def test_the_explanation_has_formula_source_and_place_of_every_row(result):
    text = to_explanation(result, Page(width=100))
    for component in result.breakdown:
        for row in component.rows:
            assert re.search(rf"row +{re.escape(row.name)}$", text, re.MULTILINE)
            assert row.formula in text
            place = f"{component.component}, {row.site}, count {row.count}"
            assert place in text
    assert text.count("source   llama3: table 3") == 11
    assert text.count("basis    formula") == 11
