"""The waterfall in the terminal: sizes, bars and prices of each step."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from estimator.render.text import Page, to_text
from estimator.service import estimate
from estimator.units import gib

REQUEST = {
    "model": "meta-llama/Llama-3.2-1B",
    "method": "qlora",
    "optimizer": "sgd",
    "activation_checkpointing": "full",
    "waterfall": True,
}


@pytest.fixture(scope="module")
def answered():
    return estimate(REQUEST)


def test_every_step_says_what_it_needs_saves_and_costs(answered):
    text = " ".join(to_text(answered).split())
    for number, step in enumerate(answered.waterfall):
        assert step.summary in text
        assert gib(step.needed_bytes) in text
        assert step.price in text
        if number and step.saves_bytes:
            assert gib(abs(step.saves_bytes)) in text


def test_a_technique_that_needs_more_says_so(answered):
    steps = answered.waterfall
    dearer = replace(steps[1], saves_bytes=-(2**30), worth_bytes=-(2**29))
    text = " ".join(to_text(replace(answered, waterfall=(steps[0], dearer))).split())
    assert "needs 1.00 GiB more" in text
    assert "this run without it: 0.50 GiB less" in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_page(answered, width):
    text = to_text(answered, Page(width=width))
    assert max(len(line) for line in text.splitlines()) <= width


def test_an_ascii_page_holds_only_ascii(answered):
    assert to_text(answered, Page(unicode=False)).isascii()


def test_without_steps_there_is_no_heading(answered):
    assert "naive" not in to_text(replace(answered, waterfall=()))
