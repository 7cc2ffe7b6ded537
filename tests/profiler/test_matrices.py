"""The tables of a campaign: every case is answered here, fits, and stands where it tells most."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, pairwise

import pytest

from estimator.request import parse_request
from estimator.units import GiB
from profiler import matrices
from profiler.levers import ANCHORS, LEVERS, anchor, impossible_pairs, request
from profiler.matrices import Case, canonical, cases, needed, needed_by_tensors, validation_rows
from profiler.pairwise import Pairs
from profiler.probes import PROBES
from profiler.real_run import refuse_stand_ins

GPU = "h100-80gb-sxm5"
OPTIONAL = {"bitsandbytes", "trl", "liger_kernel", "cut_cross_entropy"}


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setattr(matrices, "installed", lambda _: True)


@pytest.fixture
def peft_alone(monkeypatch):
    """A machine with PEFT, and no other library that a case may need."""
    monkeypatch.setattr(matrices, "installed", lambda name: name == "peft")


def _pairs(row: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def _rows(found: tuple[Case, ...]) -> list[dict[str, str]]:
    """Return the settings that cases were made of."""
    rows = [*map(anchor, ANCHORS.values()), *validation_rows()]
    of = {canonical(Case("", "", request=request(row))): row for row in rows}
    return [of[canonical(case)] for case in found]


# -- every matrix --------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["constants", "out-of-memory"])
def test_every_request_is_answered_by_the_analytic_engine(matrix, everything):
    for case in cases(matrix, GPU):
        assert case.probe or needed(case.request, GPU)["low"] > 0, case.name


def test_every_request_of_the_validation_is_answered_and_fits_79_gib(everything):
    # What the engine answers is what the real stack is asked to run: none is refused here.
    too_large = [case.name for case in cases("validation", GPU) if _high(case) > 79 * GiB]
    assert too_large == []


def _high(case: Case) -> int:
    return needed(case.request or {}, GPU)["high"]


@pytest.mark.parametrize("matrix", ["constants", "validation", "out-of-memory"])
def test_no_case_is_there_twice(matrix, everything):
    found = [canonical(case) for case in cases(matrix, GPU)]
    assert len(found) == len(set(found))
    assert len({case.name for case in cases(matrix, GPU)}) == len(found)


@pytest.mark.parametrize("matrix", ["constants", "validation", "out-of-memory"])
def test_cases_that_cannot_run_here_come_last_and_are_not_dropped(matrix, peft_alone):
    can = [not matrices.missing(case) for case in cases(matrix, GPU)]
    assert can == sorted(can, reverse=True)
    assert not all(can)


def test_the_order_does_not_change_from_process_to_process():
    line = [
        sys.executable, "-c",
        "from profiler import matrices; matrices.installed = lambda _: True\n"
        "print([each.name for name in matrices.MATRICES for each in matrices.cases(name)])",
    ]  # fmt: skip
    printed = {
        subprocess.run(line, env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, check=True, timeout=60).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1


# -- constants -----------------------------------------------------------------------------------


def test_the_first_constants_are_of_every_kind():
    kinds = [case.probe or "request" for case in cases("constants") if not case.libraries][:5]
    assert kinds == [
        "context", "cublas_workspace", "attention_backward", "embedding_backward", "request",
    ]  # fmt: skip


def test_probes_are_asked_what_they_take(everything):
    for case in cases("constants"):
        if case.probe is not None:
            defaults = PROBES[case.probe].defaults
            assert set(case.arguments) <= set(defaults), case.name
            for name, value in case.arguments.items():
                assert type(value) is type(defaults[name]), case.name


def test_no_case_asks_for_what_a_measurement_only_has_a_stand_in_for(everything):
    for matrix in ("constants", "validation", "out-of-memory"):
        for case in cases(matrix, GPU):
            if case.request is not None:
                refuse_stand_ins(parse_request(dict(case.request)))


def test_switches_of_kernels_are_looked_at_from_both_sides():
    """EmbeddingBackwardKernel sorts above 3072 tokens; gemm_4bit unpacks whole above 1536."""
    tokens = {
        (case.probe, case.arguments["tokens"])
        for case in cases("constants")
        if "tokens" in case.arguments
    }
    assert tokens >= {
        ("embedding_backward", 3072), ("embedding_backward", 3073),
        ("bnb_4bit_threshold", 1536), ("bnb_4bit_threshold", 1537),
    }  # fmt: skip


# -- validation ----------------------------------------------------------------------------------


def test_every_two_settings_that_can_meet_meet_in_some_row(everything):
    every = {
        frozenset(((a, one), (b, other)))
        for a, b in combinations(LEVERS, 2)
        for one in LEVERS[a]
        for other in LEVERS[b]
    }
    met = set().union(*map(_pairs, _rows(cases("validation"))))
    assert every - met == impossible_pairs()


def test_what_needs_no_other_library_is_covered_without_the_rest(peft_alone):
    plain = {
        lever: [name for name, each in settings.items() if not set(each.libraries) & OPTIONAL]
        for lever, settings in LEVERS.items()
    }
    pairs = Pairs(plain, impossible_pairs())
    for row in _rows(tuple(c for c in cases("validation") if not matrices.missing(c))):
        pairs.cover(row)
    assert pairs.left == 0


def test_each_next_case_has_at_most_as_many_new_pairs_as_the_one_before(everything):
    seen: set[frozenset[tuple[str, str]]] = set()
    new = []
    for row in _rows(cases("validation")):
        new.append(len(_pairs(row) - seen))
        seen |= _pairs(row)
    behind = new[len(ANCHORS) :]
    assert all(earlier >= later for earlier, later in pairwise(behind))


@pytest.mark.parametrize("machine", ["everything", "peft_alone"])
def test_the_first_sixty_cases_cover_most_pairs(machine, request):
    request.getfixturevalue(machine)
    found = cases("validation")[:60]
    assert all(not matrices.missing(case) for case in found)
    met = set().union(*map(_pairs, _rows(found)))
    assert len(met) > 0.6 * 2621


def test_an_anchor_comes_first_and_is_what_people_run(everything):
    first = cases("validation")[0]
    assert first.request is not None
    assert first.request["model"] == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert parse_request(dict(first.request)).activation_checkpointing == "full"


# -- out-of-memory -------------------------------------------------------------------------------


def test_limits_go_from_what_must_run_to_what_must_not(everything):
    found = cases("out-of-memory", GPU)
    number = len({str(case.request) for case in found})
    assert number == 12
    for case in found[:number]:
        need = needed_by_tensors(case.request, GPU)
        assert case.limit_bytes == pytest.approx(need["high"], rel=0.001)
    for case in found[number : 2 * number]:
        need = needed_by_tensors(case.request, GPU)
        assert case.limit_bytes == pytest.approx(0.97 * need["low"], rel=0.001)


def test_limits_are_of_the_allocator_and_leave_the_context_out(everything):
    """A CUDA context takes some hundred MiB, which torch does not count as the process's."""
    case = cases("out-of-memory", GPU)[0]
    whole, tensors = needed(case.request, GPU), needed_by_tensors(case.request, GPU)
    assert all(0.2 * GiB < whole[end] - tensors[end] < 1.2 * GiB for end in whole)


# -- pairs ---------------------------------------------------------------------------------------


def test_rows_cover_all_pairs_of_a_small_table():
    levers = {"a": "12", "b": "123", "c": "12"}
    rows = list(Pairs(levers, frozenset()).rows(lambda _: True))
    met = set().union(*(_pairs(dict(row.values)) for row in rows))
    # 2·3 + 2·2 + 3·2 pairs; six rows are the fewest, one for each pair of a and b.
    assert (len(met), len(rows)) == (16, 6)


def test_a_pair_that_cannot_be_is_in_no_row():
    never = frozenset((("a", "1"), ("b", "1")))
    rows = list(Pairs({"a": "12", "b": "12", "c": "12"}, frozenset((never,))).rows(lambda _: True))
    assert all(never not in _pairs(dict(row.values)) for row in rows)


def test_rows_that_are_not_accepted_are_gone_around():
    levers = {"a": "12", "b": "12", "c": "12", "d": "12"}

    def accepts(row):
        return not (row["a"] == row["b"] == row["c"] == "1")

    rows = list(Pairs(levers, frozenset()).rows(accepts))
    assert all(accepts(row.values) for row in rows)
    assert len(set().union(*(_pairs(dict(row.values)) for row in rows))) == 24
