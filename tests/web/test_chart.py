"""The drawing: bars on the scale of the card."""

import pytest
from msgspec.structs import replace

from estimator.catalog import Access
from estimator.request import parse_request
from estimator.service import estimate
from web.chart import peak_chart, timeline_chart


@pytest.fixture(scope="module")
def result():
    request = parse_request({"model": "llama-3.1-8b", "method": "qlora", "hardware": "rtx-4090"})
    return estimate(request, access=Access.CATALOGUE)


def test_the_segments_stand_side_by_side_and_add_up_to_what_the_driver_shows(result):
    chart = peak_chart(result)
    (bar,) = chart.bars
    inside = sum(part.bytes for part in result.breakdown)
    assert bar.bytes == inside + sum(row.bytes for row in result.outside)
    assert bar.bytes == result.peak.device_used_bytes.expected
    for left, right in zip(bar.segments, bar.segments[1:], strict=False):
        assert right.x == pytest.approx(left.x + left.width, abs=0.01)


def test_nothing_is_drawn_outside_of_the_drawing(result):
    for chart in (peak_chart(result), timeline_chart(result)):
        for bar in chart.bars:
            assert all(0 <= part.x <= part.x + part.width <= 100 for part in bar.segments)
        marks = [*chart.ticks, chart.capacity, chart.low, chart.high]
        assert all(0 <= mark.x <= 100 for mark in marks if mark is not None)


def test_the_capacity_stands_on_the_scale_of_the_bars(result):
    chart = peak_chart(result)
    assert chart.capacity.bytes == result.capacity.usable_bytes
    assert chart.capacity.x == pytest.approx(
        100 * chart.capacity.bytes / chart.scale_bytes, abs=0.01
    )


def test_there_is_no_capacity_without_a_card(result):
    nameless = replace(result.capacity, gpu=None, usable_bytes=None)
    assert peak_chart(replace(result, capacity=nameless)).capacity is None


def test_ticks_are_few_and_round(result):
    labels = [tick.label for tick in peak_chart(result).ticks]
    assert 2 <= len(labels) <= 9
    assert labels[0] == "0 GiB"
    assert all(label.endswith(" GiB") for label in labels)


def test_the_timeline_marks_the_peak(result):
    peaks = [bar.label for bar in timeline_chart(result).bars if bar.is_peak]
    assert peaks == [result.peak.moment]
