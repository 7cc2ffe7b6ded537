"""Our answers beside the peaks that other people measured and published."""

from __future__ import annotations

from functools import cache
from statistics import median

import pytest

from benchmarks.accuracy import report, verdicts
from benchmarks.accuracy.comparison import comparisons
from benchmarks.accuracy.points import published
from benchmarks.accuracy.published import measured, out_of_memory
from benchmarks.accuracy.records import FILE, write
from benchmarks.accuracy.report import pages
from benchmarks.accuracy.summary import grouped
from estimator.units import GiB


@cache
def findings():
    """Return what the page tells, which takes a minute; tests are collected before."""
    return report.findings()


@cache
def found():
    """Return every reading of the published rows beside our answer."""
    return comparisons(findings().rows.answered)


@cache
def scored():
    """Return the readings that count, by source and meter."""
    return grouped(published(found()))


# Lowered when an answer gets better, never raised to let a change pass. Device used of fms-main was
# 0.042 and 0.126 before its four runs of FOAK over quantized weights could be asked for, whose
# allocator keeps twice what is estimated; no answer to another run had changed. Those of the
# tutorials of torchtune were 0.052 and 0.212 for batches of 1304 tokens, which it cut to 512.
# The median of torchao was 0.024 with 32-bit states for embeddings and blocks of 256, which a loop
# of one's own in September 2024 does not make. Those of usamec were 0.042 and 0.070 with its
# baseline as an eager model with transformers' loss. Asked for as what it is, the row of Adam went
# from +4.7 % to -3.9 %, where the dry run of that request is, too.
MEDIAN_BOUNDS = {
    ("fms-main", "allocated"): 0.0005,
    ("fms-main", "device-used"): 0.0635,
    ("litgpt-resource-tables", "allocated"): 0.003,
    ("lomo-paper", "allocated"): 0.016,
    ("torchao-docs", "allocated"): 0.031,
    ("torchtune-docs-tutorials", "reserved"): 0.017,
    ("torchtune-readme-llama2-2024", "reserved"): 0.017,
    ("usamec", "device-used"): 0.037,
}
WORST_BOUNDS = {
    ("fms-main", "allocated"): 0.045,
    ("fms-main", "device-used"): 0.184,
    ("litgpt-resource-tables", "allocated"): 0.015,
    ("lomo-paper", "allocated"): 0.016,
    ("torchao-docs", "allocated"): 0.036,
    ("torchtune-docs-tutorials", "reserved"): 0.025,
    ("torchtune-readme-llama2-2024", "reserved"): 0.022,
    ("usamec", "device-used"): 0.066,
}

# `value_gib` of data/published/measured.jsonl, with the tolerance that each is held to.
ALLOCATED_GIB = [
    ("fms-main-mistral7b-full-none-bs4-1gpu", 67.46, 0.01),
    ("fms-main-mistral7b-full-none-bs8-1gpu", 67.461, 0.01),
    ("fms-main-mistral7b-lora-none-bs4-1gpu", 24.871, 0.001),
    ("fms-main-mistral7b-lora-none-bs8-1gpu", 36.082, 0.001),
    ("fms-main-mistral7b-lora-foak-fast-kernels-bs4-1gpu", 22.793, 0.001),
    ("fms-main-mistral7b-lora-foak-fast-kernels-bs8-1gpu", 31.926, 0.001),
    ("fms-main-mistral7b-qlora-accelerated-peft-bnb-bs4-1gpu", 15.249, 0.001),
    ("litgptRT-llama-2-7b-lora-mb1", 19.837, 0.002),
    ("litgptRT-llama-2-13b-qlora-nf4-dq-mb1", 21.001, 0.002),
    ("litgptRT-llama-2-7b-adapter-mb1", 18.608, 0.002),
    ("litgptRT-llama-2-7b-adapter_v2-mb1", 23.758, 0.002),
    ("fms-main-mistral7b-qlora-accelerated-peft-bnb-bs8-1gpu", 26.461, 0.001),
    ("fms-main-llama2-70b-qlora-accelerated-peft-bnb-bs4-1gpu", 63.448, 0.01),
    ("fms-main-mistral7b-gptq-lora-accelerated-peft-autogptq-bs4-1gpu", 15.278, 0.001),
    ("fms-main-mistral7b-gptq-lora-accelerated-peft-autogptq-bs8-1gpu", 26.489, 0.001),
    ("fms-main-mistral7b-gptq-lora-accelerated-peft-autogptq-foak-bs4-1gpu", 13.174, 0.001),
    ("fms-main-mistral7b-gptq-lora-accelerated-peft-autogptq-foak-bs8-1gpu", 22.308, 0.001),
    ("fms-main-mistral7b-qlora-accelerated-peft-bnb-foak-bs4-1gpu", 13.146, 0.001),
    ("fms-main-mistral7b-qlora-accelerated-peft-bnb-foak-bs8-1gpu", 22.280, 0.001),
]


def allocated(name: str) -> int:
    """Return our allocated peak of a published run [bytes]."""
    (one,) = (each for each in found() if each.run.row.id == name and each.meter == "allocated")
    return one.estimated.expected


@pytest.mark.parametrize(("name", "measured_gib", "tolerance"), ALLOCATED_GIB)
def test_the_allocated_peak_is_what_was_measured_on_an_a100(name, measured_gib, tolerance):
    assert allocated(name) == pytest.approx(measured_gib * GiB, rel=tolerance)


def test_a_token_of_lora_costs_the_734_720_bytes_that_were_measured():
    small = allocated("fms-main-mistral7b-lora-none-bs4-1gpu")
    large = allocated("fms-main-mistral7b-lora-none-bs8-1gpu")
    assert (large - small) / (4 * 4096) == pytest.approx(734_720, rel=1e-4)


def test_no_run_that_ran_out_of_memory_is_said_to_fit():
    failed = findings().failures.answered
    assert len(failed) >= 7
    assert [each.row.id for each in failed if each.result.verdict == "fits"] == []


def test_no_card_that_is_too_small_for_the_tensors_of_a_run_is_said_to_do():
    small = [each for each in findings().judged if each.source == verdicts.TOO_SMALL]
    assert len(small) >= 53
    assert [each for each in small if each.verdict == "fits"] == []


def test_no_run_that_was_measured_is_said_not_to_fit():
    runs = findings().rows.answered
    assert [each.row.id for each in runs if each.result.verdict == "does_not_fit"] == []


def test_every_scored_group_has_a_bound():
    assert scored().keys() == MEDIAN_BOUNDS.keys() == WORST_BOUNDS.keys()


@pytest.mark.parametrize("key", MEDIAN_BOUNDS)
def test_the_error_of_a_group_does_not_grow(key):
    errors = [abs(each.error) for each in scored()[key]]
    assert median(errors) <= MEDIAN_BOUNDS[key]
    assert max(errors) <= WORST_BOUNDS[key]


def test_every_published_row_is_either_answered_or_refused_with_a_reason():
    pairs = ((measured(), findings().rows), (out_of_memory(), findings().failures))
    for rows, outcome in pairs:
        assert len(outcome.answered) + len(outcome.refused) == len(rows)
        assert all(reason for _, reason in outcome.refused)


def test_the_accuracy_page_and_its_pictures_are_up_to_date():
    for path, text in pages(findings()):
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make accuracy`"


def test_the_records_of_the_published_rows_are_up_to_date(tmp_path):
    write(findings().rows, findings().failures, tmp_path / "records.jsonl")
    made = (tmp_path / "records.jsonl").read_bytes()
    assert made == FILE.read_bytes(), "run `make accuracy`"
