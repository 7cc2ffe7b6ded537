"""From a calibration file to a range: which file speaks, how wide, and what is said about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from estimator import calibration, calibration_file
from estimator.calibration import KIN, OTHER_ORDER, UNMEASURED, WIDER, Part, Spread, Work
from estimator.calibration_file import (
    Calibration,
    Constants,
    HeldOut,
    Stratum,
    Traits,
    chosen,
    installed,
    read,
)
from estimator.errors import InvalidCalibrationError
from estimator.measurement import METERS
from estimator.result import Range
from estimator.service import estimate
from estimator.units import GiB, MiB

LIKE = Traits("full", 1000, (("software", "transformers 5"),))
WORK = Work(100, 50)


def stratum(spread: float, kind: Any = None, quantity: Any = "allocated") -> Stratum:
    return Stratum(
        quantity=quantity,
        kind=kind,
        rows=60,
        groups={"llama": 40, "gpt2": 20},
        supported=0.98,
        levels=((0.5, spread / 2), (0.95, spread), (0.99, spread * 2)),
        parameters=(500, 2000),
        tokens=100,
        seq_len=50,
        choices={"software": ("transformers 5",)},
    )


def file(
    name: str, gpu: str | None, *strata: Stratum, constants: Constants | None = None
) -> Calibration:
    return Calibration(
        schema="calibration/v1",
        name=name,
        origin="published" if gpu is None else "measured",
        gpu=gpu,
        compute_capability=None if gpu is None else "9.0",
        stack={},
        made_from=(),
        constants=constants or Constants(),
        strata=strata,
        held_out=(),
    )


PUBLISHED = file("any--published", None, stratum(0.10))
H100 = file(
    "h100",
    "h100-80gb-sxm5",
    stratum(0.02),
    constants=Constants(Range(500 * MiB, 600 * MiB, 800 * MiB), None, 32 * MiB),
)


@pytest.fixture
def two_files() -> Iterator[None]:
    """Use a file of published runs and one of an H100, instead of those of the project."""
    with calibration.using(H100, PUBLISHED):
        yield


def spread_of(traits: Traits, gpu: str | None, capability: str, work: Work = WORK) -> float:
    return calibration.ranges(traits, gpu, capability, 0.95).allocated.at(work)


@pytest.mark.usefixtures("two_files")
class TestWhichFileSpeaks:
    def test_a_card_that_was_measured_has_its_own_spread(self):
        assert spread_of(LIKE, "h100-80gb-sxm5", "9.0") == 0.02

    def test_a_card_of_the_same_architecture_has_what_is_wider(self):
        assert spread_of(LIKE, "h200-141gb-sxm", "9.0") == max(0.02 * KIN, 0.10)

    def test_any_other_card_has_that_of_published_runs(self):
        assert spread_of(LIKE, "rtx-4090", "8.9") == 0.10

    def test_outside_of_what_was_measured_published_runs_speak_too(self):
        odd = Traits("full", 1000, (("software", "torchtune 0.3"),))
        assert spread_of(odd, "h100-80gb-sxm5", "9.0") == pytest.approx(0.10 * (1 + WIDER))

    def test_each_choice_that_no_run_had_is_named(self):
        odd = Traits("full", 1000, (("software", "torchtune 0.3"),))
        found = calibration.ranges(odd, None, "8.9", 0.95).allocated.promise(WORK)
        assert found.outside == ("software torchtune 0.3",)
        assert found.widened == pytest.approx(1 + WIDER)
        assert "60 published runs in 2 groups" in found.reason
        assert "none had software torchtune 0.3" in found.reason

    @pytest.mark.parametrize("parameters", [250, 4000])
    def test_a_model_half_as_large_or_twice_as_large_widens_once(self, parameters):
        odd = Traits("full", parameters, LIKE.choices)
        assert spread_of(odd, None, "8.9") == pytest.approx(0.10 * (1 + WIDER))

    def test_eight_times_the_tokens_widen_thrice_and_are_named(self):
        work = Work(800, 50)
        found = calibration.ranges(LIKE, None, "8.9", 0.95).allocated
        assert found.at(work) == pytest.approx(0.10 * (1 + 3 * WIDER))
        assert found.promise(work).outside == ("8.0 times more tokens",)

    def test_a_quantity_without_records_says_so(self):
        found = calibration.ranges(LIKE, None, "8.9", 0.95).reserved
        assert found.at(WORK) == UNMEASURED
        assert "no record" in found.promise(WORK).reason

    def test_the_constants_of_the_card_are_the_measured_ones(self):
        constants = calibration.device_constants("9.0", "h100-80gb-sxm5")
        assert constants.context == Range(500 * MiB, 600 * MiB, 800 * MiB)
        assert "measured on h100-80gb-sxm5" in constants.context_source.reason

    def test_those_of_its_kin_are_wider_by_half_and_say_so(self):
        constants = calibration.device_constants("9.0", "h200-141gb-sxm")
        assert constants.context == Range(450 * MiB, 600 * MiB, 900 * MiB)
        assert "another card of the same architecture" in constants.context_source.reason


def steps_chosen(
    traits: Traits, gpu: str | None, capability: str, confidence: float = 0.95, tokens: int = 100
) -> tuple[bool, ...]:
    """Return whether an answer says that it was widened, of another card, extrapolated."""
    said = calibration.ranges(traits, gpu, capability, confidence).reasons(Work(tokens, 50))
    ours = [each for each in said if "which we chose and nothing measures" in each]
    words = ("each choice that no measured run had", "of another card", "exponentially rarer")
    return tuple(any(word in each for each in ours) for word in words)


@pytest.mark.usefixtures("two_files")
class TestWhatOfARangeWeChose:
    ODD = Traits("full", 1000, (("software", "torchtune 0.3"),))
    H100 = ("h100-80gb-sxm5", "9.0")

    def test_a_request_like_the_runs_of_its_card_has_none_of_it(self):
        assert steps_chosen(LIKE, *self.H100) == (False, False, False)

    def test_the_step_for_a_choice_that_no_run_had_is_told(self):
        assert steps_chosen(self.ODD, *self.H100) == (True, False, False)

    def test_and_so_is_that_for_more_tokens_than_they_had(self):
        assert steps_chosen(LIKE, *self.H100, tokens=101) == (True, False, False)

    def test_a_confidence_beyond_the_runs_is_told_with_both_numbers(self):
        assert steps_chosen(LIKE, *self.H100, confidence=0.98) == (False, False, True)
        (said,) = calibration.ranges(LIKE, *self.H100, 0.98).allocated.assumptions(WORK)
        assert "60 runs show what happens up to a confidence of 98.0%; up to 99% " in said.reason

    def test_a_quantity_without_records_is_told(self):
        said = calibration.ranges(LIKE, None, "8.9", 0.95).reasons(WORK)
        assert any(
            "without any record is taken to lie within 25%: a width" in each for each in said
        )

    def test_the_step_for_another_card_is_told_where_its_range_holds(self):
        """Here published runs are wider than those of the other card, and nothing is assumed."""
        assert steps_chosen(LIKE, "h200-141gb-sxm", "9.0") == (False, False, False)
        with calibration.using(structs.replace(H100, strata=(stratum(0.09),)), PUBLISHED):
            assert steps_chosen(LIKE, "h200-141gb-sxm", "9.0") == (False, True, False)

    def test_a_context_of_another_card_says_that_its_width_is_a_choice(self):
        constants = calibration.device_constants("9.0", "h200-141gb-sxm")
        assert "50% wider, a step that we chose" in constants.context_source.reason


def of_stack(torch: str, transformers: str, software: str, gpu: str = "h100") -> Calibration:
    """Return a calibration of one card whose runs all said that they are of some software."""
    made = stratum(0.02)
    made = structs.replace(made, choices={"software": (software,)})
    name = f"{gpu}--torch-{torch}-transformers-{transformers}"
    stack = {"torch": torch, "transformers": transformers}
    return structs.replace(file(name, gpu, made), stack=stack)


NINE = of_stack("2.9", "4.57", "transformers 5")
THIRTEEN = of_stack("2.13", "5.23", "transformers 5")
OLD = of_stack("2.9", "4.48", "transformers 4")


@pytest.mark.parametrize("order", list(itertools.permutations((NINE, THIRTEEN, OLD))))
class TestOfSeveralStacksOnOneCard:
    def test_torch_2_13_is_newer_than_2_9(self, order):
        for software in ("transformers 5", "trl 1.16", ""):
            assert chosen(order, "h100", "9.0", software).own is THIRTEEN

    def test_one_that_ran_the_software_comes_before_a_newer_one(self, order):
        assert chosen(order, "h100", "9.0", "transformers 4").own is OLD

    def test_else_the_nearest_version_of_the_framework_is_taken(self, order):
        assert chosen(order, "h100", "9.0", "transformers 4.45").own is OLD

    def test_the_same_holds_for_a_card_of_its_kin(self, order):
        assert chosen(order, "h200", "9.0", "transformers 5").kin is THIRTEEN
        assert chosen(order, "h200", "9.0", "transformers 4").kin is OLD


def test_a_stack_without_transformers_comes_last():
    bare = structs.replace(of_stack("2.13", "unknown", "torchtune 0.6"), name="z")
    assert chosen((NINE, bare), "h100", "9.0", "transformers 4.45").own is NINE


def test_an_answer_takes_ranges_and_context_from_one_stack():
    h100 = "h100-80gb-sxm5"
    context = Range(1 * MiB, 2 * MiB, 3 * MiB)
    old = structs.replace(
        of_stack("2.9", "4.48", "transformers 4", h100), constants=Constants(context)
    )
    new = of_stack("2.13", "5.23", "transformers 5", h100)
    request = {
        "model": "gpt2",
        "seq_len": 512,
        "hardware": {"gpu": h100},
        "software": {"framework": "transformers", "version": "4"},
    }
    with calibration.using(old, new):
        found = estimate(request)
        assert found.promises.calibration == old.name
        assert any(old.name in each for each in found.assumptions)
        del request["software"]
        assert estimate(request).promises.calibration == new.name


def test_a_kind_of_method_has_its_own_spread_where_there_is_one():
    made = file("a", None, stratum(0.1), stratum(0.03, "full"))
    assert made.stratum("allocated", "full") == stratum(0.03, "full")
    assert made.stratum("allocated", "quantized") == stratum(0.1)
    assert made.stratum("reserved", "full") is None


@pytest.mark.parametrize(
    ("confidence", "spread"), [(0.5, 0.05), (0.51, 0.1), (0.95, 0.1), (0.96, 0.2), (0.9999, 0.2)]
)
def test_the_next_higher_level_holds(confidence, spread):
    assert stratum(0.1).spread(confidence) == spread


@given(st.integers(1, 2**45), st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_range_holds_its_value_and_grows_with_the_batch(expected, tokens, seq_len):
    spread = Spread("allocated", (Part(stratum(0.1), 0.1, 0.0, (), "published runs"),))
    found = spread.around(expected, Work(tokens, seq_len))
    larger = spread.around(expected, Work(2 * tokens, 2 * seq_len))
    assert found.low <= expected <= found.high
    assert larger.low <= found.low
    assert larger.high >= found.high


def test_the_high_end_of_what_is_needed_keeps_room_for_what_cannot_be_given_back():
    found = estimate({"model": "gpt2", "seq_len": 512, "hardware": {"memory_bytes": 8 * GiB}})
    allocated, needed = found.peak.allocated_bytes, found.peak.needed_bytes
    assert needed.high > allocated.high * OTHER_ORDER


def test_more_confidence_never_makes_a_range_narrower():
    answers = [
        estimate({"model": "gpt2", "seq_len": 512, "confidence": confidence}).peak
        for confidence in (0.5, 0.8, 0.95, 0.99, 0.9999)
    ]
    for less, more in itertools.pairwise(answers):
        assert less.needed_bytes.high <= more.needed_bytes.high
        assert less.needed_bytes.low >= more.needed_bytes.low
        assert less.device_used_bytes.high <= more.device_used_bytes.high
    assert answers[0].needed_bytes.high < answers[-1].needed_bytes.high


def test_a_card_between_two_confidences_fits_at_the_lower_one_only():
    sure, unsure = (
        estimate({"model": "gpt2", "seq_len": 512, "confidence": confidence}).peak.needed_bytes
        for confidence in (0.9999, 0.5)
    )
    memory = (sure.high + unsure.high) // 2
    verdicts = [
        estimate(
            {
                "model": "gpt2",
                "seq_len": 512,
                "confidence": confidence,
                "hardware": {"memory_bytes": memory},
            }
        ).verdict
        for confidence in (0.5, 0.9999)
    ]
    assert verdicts == ["fits", "tight"]


def test_every_answer_names_its_calibration_and_confidence():
    found = estimate({"model": "gpt2", "seq_len": 512, "confidence": 0.9})
    assert found.promises.confidence == 0.9
    assert found.promises.calibration == "any--published"
    assert {each.quantity for each in found.promises.ranges} >= {
        "allocated",
        "reserved",
        "device-used",
    }
    assert all(each.reason in found.assumptions for each in found.promises.ranges)


def test_a_range_is_named_as_the_meter_that_reconcile_takes():
    named = {each.quantity for each in estimate({"model": "gpt2", "seq_len": 512}).promises.ranges}
    assert named - {"needed"} == METERS.keys() - {"nvidia-smi"}


def test_the_files_that_came_with_the_project_can_be_read():
    assert [each.name for each in installed() if each.gpu is None] == ["any--published"]
    assert all(each.origin != "simulated" for each in installed())


@pytest.mark.parametrize("text", ["{", '{"schema": "calibration/v1"}', '{"schema": "other/v1"}'])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InvalidCalibrationError, match=r"broken\.json"):
        read(path)


def test_a_file_with_the_old_spelling_of_a_quantity_is_read(tmp_path):
    """Files of before said "device used" where `estimate reconcile` says "device-used"."""
    new = file("a", None, stratum(0.1, quantity="device-used"))
    new = structs.replace(new, held_out=(HeldOut("device-used", 0.95, 3, 2),))
    old = calibration_file.encode(new).replace(b'"device-used"', b'"device used"')
    assert old.count(b"device used") == 2
    path = tmp_path / "old.json"
    path.write_bytes(old)
    assert read(path) == new


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "h100.json"
    path.write_bytes(calibration_file.encode(H100))
    assert read(path) == H100
