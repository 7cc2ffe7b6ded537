"""From records to spreads: coverage that holds, groups that count, and what is refused."""

from __future__ import annotations

import random
from math import exp
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from estimator.calibration_file import FOLDER, Traits, encode, installed, read
from estimator.catalog.folder import data_folder
from estimator.errors import InvalidCalibrationError
from estimator.record import Environment, Meters, Origin, Probe, Run, append
from estimator.request import parse_request
from estimator.result import Range
from estimator.service import estimate
from estimator.units import GiB, MiB
from profiler.calibrate import Residual, calibrations, held_out, spread, strata
from profiler.calibrate_cli import calibrate

PUBLISHED = data_folder() / "published" / "records.jsonl"
TRAITS = Traits("full", 1000, ())


def residual(ratio: float, group: str = "one", quantity: Any = "allocated") -> Residual:
    return Residual(quantity, group, ratio, TRAITS, 100, 50)


# -- quantiles ---------------------------------------------------------------------------------


def test_nineteen_rows_are_the_fewest_for_95_percent():
    """A finite region needs ceil((n + 1)(1 - alpha)) <= n: 19 cases for 0.05, 99 for 0.01.

    Source: the documentation of rtemis 1.4, setup_SplitConformal.
    """
    rows = [residual(1 + step / 100) for step in range(1, 20)]
    assert spread(rows, 0.95) == pytest.approx(0.19)
    assert spread(rows[:-1], 0.95) > 0.18
    rows = [residual(1 + step / 1000) for step in range(1, 100)]
    assert spread(rows, 0.99) == pytest.approx(0.099)
    assert spread(rows[:-1], 0.99) > 0.098


def test_measured_above_and_below_count_alike():
    assert residual(1.25).size == pytest.approx(residual(0.8).size)


def test_the_worst_group_decides_however_many_rows_the_others_have():
    calm = [residual(1.001, "calm") for _ in range(200)]
    wild = [residual(1.2, "wild")]
    assert spread([*calm, *wild], 0.95) == pytest.approx(0.2)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_the_next_measurement_lies_inside_as_often_as_was_said(confidence):
    """Drawn a thousand times: 60 rows, a spread, and one row more from the same distribution."""
    draw = random.Random(20261128)
    inside = 0
    for _ in range(1000):
        rows = [residual(exp(draw.gauss(0.0, 0.03))) for _ in range(61)]
        inside += rows[-1].size <= spread(rows[:-1], confidence)
    # Three standard deviations of a share of 1000 draws.
    assert inside / 1000 >= confidence - 3 * (confidence * (1 - confidence) / 1000) ** 0.5
    assert inside / 1000 < 1.0


def test_a_stratum_of_its_own_needs_rows_and_groups():
    def rows(kind: Any, groups: int, count: int) -> list[Residual]:
        traits = Traits(kind, 1000, ())
        return [
            Residual("allocated", f"group {index % groups}", 1.01, traits, 100, 50)
            for index in range(count)
        ]

    found = strata([*rows("full", 3, 20), *rows("adapters", 2, 30), *rows("quantized", 3, 19)])
    assert [(each.kind, each.rows) for each in found] == [(None, 69), ("full", 20)]


def test_what_is_reserved_and_what_the_device_shows_help_each_other_out():
    rows = [residual(1.1, "a", "reserved")] * 5 + [residual(1.3, "b", "device-used")] * 6
    assert {each.quantity: each.rows for each in strata(rows)} == {
        "reserved": 11,
        "device-used": 11,
    }


def test_a_group_is_judged_by_ranges_made_without_it():
    rows = [residual(1.01, "a")] * 30 + [residual(1.5, "b")] * 2
    (found,) = held_out(rows)
    assert (found.rows, found.inside) == (32, 30)


# -- the published runs ------------------------------------------------------------------------


def test_ranges_hold_95_percent_of_the_published_rows_of_sources_left_out():
    (published,) = [each for each in installed() if each.gpu is None]
    rows = sum(each.rows for each in published.held_out)
    assert rows >= 86
    assert sum(each.inside for each in published.held_out) / rows >= 0.95


def test_the_installed_calibrations_are_what_the_records_give(tmp_path):
    outcome = CliRunner().invoke(calibrate, ["--check"], standalone_mode=False)
    assert outcome.exception is None
    assert outcome.return_value == 0, outcome.output


# -- records of a device -----------------------------------------------------------------------

REQUEST: dict[str, Any] = {
    "model": {"config": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": 1000, "max_position_embeddings": 4096,
    }},
    "seq_len": 256,
    "hardware": {"gpu": "h100-80gb-sxm5"},
}  # fmt: skip
PLACE = Environment(
    gpu="NVIDIA H100 80GB HBM3",
    gpu_id="h100-80gb-sxm5",
    compute_capability="9.0",
    versions={"torch": "2.13.0+cu130", "transformers": "5.23.0"},
)


def run(
    name: str, ratio: float, *, context: int = 600 * MiB, origin: Origin = "simulated", **more: Any
) -> Run:
    """Return a record whose meters read our own estimate times a ratio, and a context."""
    request = parse_request({**REQUEST, "seq_len": 256 + int(name)})
    peak = estimate(request).peak
    reserved = round(peak.reserved_bytes.expected * ratio)
    return Run(
        id=name,
        origin=origin,
        group="test",
        request=request.to_dict(),
        outcome="ok",
        peak=Meters(
            allocated_bytes=round(peak.allocated_bytes.expected * ratio),
            reserved_bytes=reserved,
            device_used_bytes=reserved + context,
        ),
        idle_bytes=400 * MiB,
        environment=PLACE,
        **more,
    )


def written(tmp_path: Path, *records: Run | Probe) -> Path:
    path = tmp_path / "records.jsonl"
    for each in records:
        append(path, each)
    return path


def test_simulated_records_are_refused(tmp_path):
    with pytest.raises(InvalidCalibrationError, match="simulated device"):
        calibrations([written(tmp_path, run("1", 1.0))], root=tmp_path)


def test_constants_and_spreads_come_from_the_records(tmp_path):
    runs = [
        run(str(index), 1 + index / 1000, context=(500 + index) * MiB) for index in range(1, 22)
    ]
    probe = Probe(
        id="p", origin="simulated", group="test", name="cublas_workspace", arguments={},
        outcome="ok", values={"first_forward": 32 * MiB}, environment=PLACE,
    )  # fmt: skip
    path = written(tmp_path, *runs, probe)
    (made,), left_out = calibrations([path], root=tmp_path, allow_simulated=True)
    assert left_out == ()
    assert made.name == "h100-80gb-sxm5--torch-2.13-transformers-5.23"
    assert (made.origin, made.gpu, made.compute_capability) == (
        "simulated",
        "h100-80gb-sxm5",
        "9.0",
    )
    assert made.constants.context == Range(501 * MiB, 511 * MiB, 521 * MiB)
    assert made.constants.idle_context == Range(400 * MiB, 400 * MiB, 400 * MiB)
    assert made.constants.cublas_workspace == 32 * MiB
    allocated = made.stratum("allocated", "full")
    assert allocated is not None
    assert allocated.groups == {"llama": 21}
    # The 21st of 21: ceil(22 x 0.95).
    assert allocated.spread(0.95) == pytest.approx(0.021, abs=1e-6)
    assert [each.records for each in made.made_from] == [22]


def test_a_sweep_says_what_a_run_needs(tmp_path):
    """It ran with 4 GiB and not with 3: the need lies between, and the farther end counts."""
    enough = run("1", 1.0, limit_bytes=4 * GiB)
    failed = Run(
        id="2", origin="simulated", group="test", request=enough.request, outcome="out_of_memory",
        limit_bytes=3 * GiB, environment=PLACE,
    )  # fmt: skip
    path = written(tmp_path, enough, failed, run("3", 1.0))
    (made,), _ = calibrations([path], root=tmp_path, allow_simulated=True)
    needed = made.stratum("needed", "full")
    assert needed is not None
    assert needed.rows == 1
    need = estimate(enough.request).peak.needed_bytes.expected
    context = next(row.bytes for row in estimate(enough.request).outside if "context" in row.name)
    assert needed.levels[0][1] == pytest.approx(4 * GiB / (need - context) - 1, abs=1e-6)


def test_a_record_without_an_answer_is_left_out_by_name(tmp_path):
    odd = Run(
        id="odd", origin="simulated", group="test", outcome="ok", environment=PLACE,
        request={"model": "nobody/knows-this"}, peak=Meters(allocated_bytes=1),
    )  # fmt: skip
    path = written(tmp_path, run("1", 1.0), odd)
    _, left_out = calibrations([path], root=tmp_path, allow_simulated=True)
    assert [each.partition(":")[0] for each in left_out] == ["odd"]


def test_a_request_without_its_defaults_is_read_with_them(tmp_path):
    short = {"model": "openai-community/gpt2", "seq_len": 512}
    path = written(
        tmp_path,
        Run(
            id="short", origin="simulated", group="test", outcome="ok", environment=PLACE,
            request=short, peak=Meters(allocated_bytes=2**30),
        ),
    )  # fmt: skip
    (made,), left_out = calibrations([path], root=tmp_path, allow_simulated=True)
    assert left_out == ()
    assert [(each.tokens, each.seq_len) for each in made.strata] == [(512, 512)]


@pytest.mark.parametrize(
    ("peak", "limit"), [(Meters(allocated_bytes=0), None), (Meters(allocated_bytes=5), 0)]
)
def test_a_meter_or_a_limit_of_nothing_is_left_out_by_name(tmp_path, peak, limit):
    nothing = Run(
        id="nothing", origin="simulated", group="test", outcome="ok", environment=PLACE,
        request=REQUEST, peak=peak, limit_bytes=limit,
    )  # fmt: skip
    path = written(tmp_path, run("1", 1.0), nothing)
    _, left_out = calibrations([path], root=tmp_path, allow_simulated=True)
    assert left_out == ("nothing: a meter or a limit of 0 bytes",)


def test_records_without_any_answer_are_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"")
    with pytest.raises(InvalidCalibrationError, match="no records"):
        calibrations([path], root=tmp_path)


def test_two_runs_give_the_same_bytes():
    first, second = (
        [encode(each) for each in calibrations([PUBLISHED], root=data_folder().parent)[0]]
        for _ in range(2)
    )
    assert first == second


# -- the command -------------------------------------------------------------------------------


def test_the_command_writes_what_it_was_asked_for(tmp_path):
    path = written(tmp_path, *(run(str(index), 1.0) for index in range(1, 4)))
    out = tmp_path / FOLDER
    arguments = [str(path), "--out", str(out), "--allow-simulated"]
    outcome = CliRunner().invoke(calibrate, arguments, standalone_mode=False)
    assert outcome.exception is None
    (made,) = out.iterdir()
    assert read(made).origin == "simulated"
    assert "3 runs: llama 3" in outcome.output


def test_simulated_records_never_reach_the_installed_files(tmp_path):
    path = written(tmp_path, run("1", 1.0))
    outcome = CliRunner().invoke(calibrate, [str(path), "--allow-simulated"])
    assert outcome.exit_code == 2
    assert "--out" in outcome.output
