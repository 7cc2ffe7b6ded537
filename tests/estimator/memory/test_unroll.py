"""What is written out for all layers equals what happens when all of them are run."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.eager.tensor import Regime, Section
from estimator.memory.trace import Recording, record, record_layers
from estimator.memory.unroll import NotPeriodicError, shorten, unroll
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.run import Run

MODELS = (
    "meta-llama/Llama-3.1-8B",  # every layer alike
    "google/gemma-2-9b",  # two kinds by turns
    "google/gemma-3-1b-pt",  # five of one kind, then one of another; two rotary tables
    "openai-community/gpt2",
    "EleutherAI/pythia-1b",
)
RECIPES = (
    {},
    {"method": "lora"},
    {"method": "qlora", "activation_checkpointing": "full"},
    {"precision": "amp_bf16", "activation_checkpointing": "full"},
    {"precision": "fp32", "attention": "eager", "padding": True},
    {"loop": {"use_cache": True, "keep_outputs": True}},
    {"gradient_accumulation_steps": 4},
)


def _run(model: str, recipe: dict[str, object]) -> Run:
    request = parse_request({"model": model, **recipe})
    return resolve(request, find_model(model, Access.CATALOGUE).config, model)


def _history(recording: Recording) -> list[object]:
    """Return what happens without numbers that a run is free to choose: names by order of birth."""
    order: dict[int, int] = {}
    history: list[object] = []
    for section in recording.log:
        history.append((section.phase, recording.sites[section.site]))
        freed: list[int] = []
        for number, kind in section.events:
            if kind is None:
                freed.append(order[number])
                continue
            # Neighbours that are freed together merge into one block, whichever goes first.
            history.append(sorted(freed))
            freed.clear()
            order[number] = len(order)
            history.append((order[number], recording.kinds[kind].size))
        history.append(sorted(freed))
    return history


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_a_few_layers_written_out_are_all_layers_run(model: str, recipe: dict[str, object]) -> None:
    run = _run(model, recipe)
    cut = shorten(run.spec.pattern)
    short = record_layers(run, Regime(), cut.pattern)
    log = unroll(short.log, [kind.size for kind in short.kinds], cut)
    whole = record_layers(run, Regime(), run.spec.pattern)
    assert cut.copies > 0
    assert _history(Recording(short.kinds, short.sites, log)) == _history(whole)


def test_layers_that_do_not_repeat_are_refused() -> None:
    cut = shorten((0,) * 6)
    sizes = [(layer + 1, 0) for layer in range(len(cut.pattern))]
    growing = [Section("forward", layer + 1, ((layer, layer),)) for layer in range(5)]
    back = [Section("backward", layer + 1, ((10 + layer, 0),)) for layer in reversed(range(5))]
    with pytest.raises(NotPeriodicError, match="differ in forward"):
        unroll([*growing, *back], sizes, cut)


def test_a_stack_too_short_to_leave_layers_out_is_run_as_it_is() -> None:
    model = "meta-llama/Llama-3.1-8B"
    config = {**find_model(model, Access.CATALOGUE).config, "num_hidden_layers": 3}
    run = resolve(parse_request({"model": model}), config, model)
    assert shorten(run.spec.pattern).copies == 0
    assert _history(record(run, Regime())) == _history(
        record_layers(run, Regime(), run.spec.pattern)
    )
