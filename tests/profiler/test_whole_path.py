"""The whole path on a machine without a GPU: measured, recorded, calibrated, on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import summary, verdicts
from benchmarks.accuracy.points import Point, recorded
from estimator.calibration import using
from estimator.calibration_file import Calibration, chosen, encode
from estimator.catalog import find_gpu
from estimator.record import append, read, runs
from estimator.request import parse_request
from profiler.calibrate import calibrations
from profiler.device import Simulated
from profiler.measurement import Options, measure

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 4096,
}  # fmt: skip
RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"method": "lora", "activation_checkpointing": "full"},
    {"precision": "amp_bf16", "micro_batch_size": 2},
)
GPU = "h100-80gb-sxm"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measure every recipe on a simulated card, the first one under two memory limits as well."""
    path = tmp_path_factory.mktemp("campaign") / "records.jsonl"

    def measured(name: str, recipe: dict[str, Any], limit: int | None = None) -> Any:
        document = {"model": {"config": LLAMA}, "seq_len": 256, "hardware": {"gpu": GPU}, **recipe}
        options = Options(group="test", id=name, limit_bytes=limit)
        record = measure(parse_request(document), LLAMA, Simulated(find_gpu(GPU)), options)
        append(path, record)
        return record

    for index, recipe in enumerate(RECIPES):
        measured(str(index), recipe)
    (first, *_) = runs(read(path))
    assert first.peak.reserved_bytes is not None
    assert measured("enough", RECIPES[0], first.peak.reserved_bytes).outcome == "ok"
    assert measured("too little", RECIPES[0], first.peak.reserved_bytes // 2).outcome != "ok"
    return path


@pytest.fixture(scope="module")
def made(records: Path) -> Calibration:
    """Calibrate from the records."""
    found, left_out = calibrations([records], root=records.parent, allow_simulated=True)
    assert left_out == ()
    (calibration,) = found
    return calibration


def test_every_quantity_has_a_spread(made):
    """The simulated card is the dry run, which the formulas follow within 1 %."""
    rows = {each.quantity: (each.rows, each.spread(0.5)) for each in made.strata}
    assert rows["allocated"][0] == 3
    assert rows["allocated"][1] < 0.01
    assert rows["needed"][0] == 1
    assert {"reserved", "device-used"} <= rows.keys()


def test_the_context_is_that_of_the_card(made):
    assert made.constants.context is not None
    assert made.constants.context.expected == Simulated(find_gpu(GPU)).constants.context.expected


def test_the_card_it_was_made_for_gets_it(made):
    assert chosen([made], GPU, "9.0").own is made
    assert chosen([made], "h200-141gb-sxm", "9.0").kin is made


def test_what_is_installed_changes_nothing_about_what_is_computed(records, made):
    with using(made):
        (again,), _ = calibrations([records], root=records.parent, allow_simulated=True)
    assert encode(again) == encode(made)


def test_with_it_the_ranges_hold_the_runs_it_was_made_from(records, made):
    with using(made):
        points = recorded(runs(read(records)))
    assert all(point.inside for point in points)
    assert max(point.width for point in points if point.meter == "allocated") < 0.05


def test_the_page_counts_the_records(records):
    points: tuple[Point, ...] = recorded(runs(read(records)))
    assert {each.meter for each in points} == {"allocated", "reserved", "device-used"}
    assert all(abs(each.error) < 0.01 for each in points if each.meter == "allocated")
    table = "\n".join(summary.by_source(points, 0.05))
    assert f"| test on {GPU} | allocated | 3 |" in table


def test_the_page_judges_the_limited_runs(records):
    judged = verdicts.swept(runs(read(records)))
    assert [each.ran for each in judged] == [True, False]
    assert "0 false fits" in "\n".join(verdicts.table(judged))
