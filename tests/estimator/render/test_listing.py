"""The catalogue as lists."""

from __future__ import annotations

import json

from estimator.catalog import find_gpu, models
from estimator.render.listing import gpus_document, gpus_text, models_document, models_text
from estimator.render.text import Page


def _llama():
    return [model for model in models() if model.id == "meta-llama/Llama-3.1-8B"]


def test_a_model_is_listed_with_its_parameters():
    assert "8 030 261 248" in models_text(_llama(), Page())
    (entry,) = json.loads(models_document(_llama()))
    assert entry["parameters"] == 8_030_261_248


def test_a_gpu_is_listed_with_what_a_process_can_use():
    card = find_gpu("rtx-4090")
    (entry,) = json.loads(gpus_document([card]))
    assert entry["usable_bytes"] == card.usable_bytes
    assert "24.00 GiB" in gpus_text([card], Page())


def test_lists_fit_sixty_columns():
    lines = models_text(models(), Page(width=60)).splitlines()
    assert max(map(len, lines)) <= 60
