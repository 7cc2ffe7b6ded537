"""Lit-GPT's own model: what its scripts print, and what is refused."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.errors import (
    InvalidRequestError,
    UnsupportedCombinationError,
    UnsupportedModelError,
)
from estimator.request import parse_request
from estimator.resolve import resolve

LORA = {"name": "lora", "r": 8, "target_modules": ["attn"], "adapter_dtype": "base"}


def _run(model: str, **fields):
    document = {"model": model, "method": LORA, "software": "litgpt", **fields}
    request = parse_request(document)
    return resolve(request, find_model(model, Access.CATALOGUE).config, model)


# Lit-GPT, tutorials/resource-tables.md at 0cc02afa, "Trainable parameters".
PRINTED = [
    ("microsoft/phi-1_5", 1_572_864),
    ("stabilityai/stablelm-base-alpha-3b", 2_097_152),
    ("meta-llama/Llama-2-7b-hf", 4_194_304),
    ("meta-llama/Llama-2-13b-hf", 6_553_600),
]


@pytest.mark.parametrize(("model", "trainable"), PRINTED)
def test_trained_parameters_are_those_that_the_script_printed(model, trainable):
    assert _run(model).spec.trainable_parameters() == trainable


def test_a_framework_without_a_version_means_its_newest():
    request = parse_request({"model": "gpt2", "software": "litgpt"})
    assert (request.software.framework, request.software.version) == ("litgpt", "2023.10")


def test_a_version_of_another_framework_is_refused_with_what_there_is():
    with pytest.raises(InvalidRequestError, match=r"litgpt has no version '5' here; it has 2023"):
        _run("meta-llama/Llama-2-7b-hf", software={"framework": "litgpt", "version": "5"})


def test_a_family_that_is_not_described_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"llama, gpt_neox and phi, not for 'falcon'"):
        _run("tiiuae/falcon-7b")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": "eager"}, "attention 'eager'"),
        ({"precision": "fp32"}, "precision 'fp32'"),
        ({"padding": True}, "padding"),
        ({"activation_checkpointing": "full"}, "activation checkpointing"),
        ({"loss": "chunked"}, "loss 'chunked'"),
        ({"method": "full"}, "method 'full'"),
        ({"method": "dora"}, "use_dora"),
    ],
)
def test_what_its_code_is_not_described_for_is_refused_by_name(fields, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _run("meta-llama/Llama-2-7b-hf", **fields)


def test_four_bits_reach_the_head_too():
    run = _run("meta-llama/Llama-2-7b-hf", quantization={"name": "nf4", "prepare_kbit": False})
    assert run.spec.head.format is not None
