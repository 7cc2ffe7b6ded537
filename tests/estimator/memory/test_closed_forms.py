"""Saved activations against closed forms that were measured on the real library.

The forms are those of a storage-level tracker under fake tensors over transformers 5.23, PEFT 0.21
and torch 2.13: bytes for one token and one inner layer, with scaled dot product attention and
without checkpointing unless said otherwise. Letters: h hidden size, a all query heads, k all key
and value heads, f feed-forward width, H query heads, V vocabulary, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from estimator.catalog.model import Access, find_model
from estimator.eager.size import BATCH, SEQ
from estimator.eager.tensor import Live, Regime
from estimator.memory.trace import Trace, trace
from estimator.request import parse_request
from estimator.resolve import resolve

PER_TOKEN = 3
"""Index of the monomial b·s."""
INNER_LAYER = 2
"""Place in a trace of a layer that is neither the first nor the last."""

GROUPED_HEADS = (
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen2.5-1.5B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "HuggingFaceTB/SmolLM2-135M",
    "mistralai/Mistral-Nemo-Base-2407",
    "01-ai/Yi-6B",
)
OWN_HEADS = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "openlm-research/open_llama_3b",
    "Qwen/Qwen1.5-0.5B",
    "HuggingFaceTB/SmolLM2-1.7B",
)
"""As many key and value heads as query heads: grouped ones have no fused kernel in fp32."""

# One row for each recipe: bytes that stand before h, a, k, f, H and 1.
FULL = {
    "bf16": (16, 4, 4, 8, 4, 8),
    "fp32": (24, 8, 8, 16, 4, 8),
    "amp_bf16": (26, 4, 4, 8, 4, 8),
}
LORA_CORE = (8, 4, 4, 6, 4, 8)
QLORA_CORE = (8, 4, 4, 12, 4, 8)

FP32_ADAPTERS: dict[str, Any] = {"method": {"name": "lora", "r": 16, "lora_dropout": 0.0}}
FP32_ADAPTERS_DROPOUT: dict[str, Any] = {"method": {"name": "lora", "r": 16, "lora_dropout": 0.1}}
BASE_ADAPTERS: dict[str, Any] = {"method": {"name": "lora", "r": 16, "adapter_dtype": "base"}}
BASE_ADAPTERS_DROPOUT: dict[str, Any] = {
    "method": {"name": "lora", "r": 16, "lora_dropout": 0.1, "adapter_dtype": "base"}
}
AUTOCAST = {"autocast": "bf16"}
PREPARED = {"autocast": "bf16", "quantization": {"name": "nf4", "prepare_kbit": True}}

# One row for each recipe: the core, then what each adapted linear layer adds in inputs of width n:
# for q, k, v, o, gate, up and down in this order; and bytes before r for each of the seven.
ADAPTED: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], int]] = {
    "fp32 adapters": (FP32_ADAPTERS, LORA_CORE, (4, 4, 4, 4, 4, 4, 4), 4),
    "fp32 adapters, dropout": (FP32_ADAPTERS_DROPOUT, LORA_CORE, (5, 5, 5, 5, 5, 5, 5), 4),
    # q, k, v share one input, gate and up another; the input of o is attention's own output.
    "bf16 adapters": (BASE_ADAPTERS, LORA_CORE, (2, 0, 0, 0, 2, 0, 2), 2),
    "bf16 adapters, dropout": (BASE_ADAPTERS_DROPOUT, LORA_CORE, (3, 3, 3, 3, 3, 3, 3), 2),
    "fp32 adapters under autocast": (
        {**FP32_ADAPTERS, **AUTOCAST}, LORA_CORE, (2, 2, 2, 2, 2, 2, 2), 2,
    ),
    "fp32 adapters under autocast, dropout": (
        {**FP32_ADAPTERS_DROPOUT, **AUTOCAST}, LORA_CORE, (3, 3, 3, 3, 3, 3, 3), 2,
    ),
    "QLoRA": ({**FP32_ADAPTERS, **PREPARED}, QLORA_CORE, (2, 2, 2, 0, 2, 2, 2), 2),
    "QLoRA, dropout": (
        {**FP32_ADAPTERS_DROPOUT, **PREPARED}, QLORA_CORE, (3, 3, 3, 3, 3, 3, 3), 2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Letters:
    """The sizes of a model by the letters of the forms."""

    h: int
    a: int
    k: int
    f: int
    H: int

    def form(self, row: tuple[int, ...]) -> int:
        """Put the sizes into one row of a table."""
        sizes = (self.h, self.a, self.k, self.f, self.H, 1)
        return sum(before * size for before, size in zip(row, sizes, strict=True))


def _config(model: str) -> Mapping[str, Any]:
    return find_model(model, Access.CATALOGUE).config


def _letters(model: str) -> Letters:
    config = _config(model)
    h, heads = config["hidden_size"], config["num_attention_heads"]
    shared, width = config.get("num_key_value_heads", heads), config.get("head_dim", h // heads)
    return Letters(h, heads * width, shared * width, config["intermediate_size"], heads)


@cache
def _traced(model: str, recipe: str) -> Trace:
    """Run one step of a catalogue model; the recipe is a request document without the model."""
    document = {**json.loads(recipe), "model": model}
    return trace(resolve(parse_request(document), _config(model), model), Regime())


def _trace(model: str, **recipe: Any) -> Trace:
    return _traced(model, json.dumps(recipe))


def _saved(seen: Trace, site: int, monomial: int = PER_TOKEN) -> int:
    """Return the activations of one site when backward begins, before one monomial [bytes]."""
    kinds = ((seen.kinds[kind], count) for kind, count in seen.backward_saved.items())
    return sum(
        count * kind.size[0]
        for kind, count in kinds
        if kind.component == "activations" and kind.site == site and kind.size[1] == monomial
    )


@pytest.mark.parametrize("model", GROUPED_HEADS + OWN_HEADS)
@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_a_layer_saves_what_the_closed_form_says(precision: str, model: str) -> None:
    seen = _trace(model, precision=precision)
    assert _saved(seen, INNER_LAYER) == _letters(model).form(FULL[precision])


@pytest.mark.parametrize("model", OWN_HEADS)
def test_a_layer_in_fp32_saves_what_the_closed_form_says(model: str) -> None:
    seen = _trace(model, precision="fp32")
    assert _saved(seen, INNER_LAYER) == _letters(model).form(FULL["fp32"])


def test_llama_3_1_8b_saves_200_840_bytes_for_a_token_and_layer() -> None:
    assert _saved(_trace("meta-llama/Llama-3.1-8B"), INNER_LAYER) == 200_840


@pytest.mark.parametrize("model", GROUPED_HEADS)
def test_autocast_keeps_a_half_precision_copy_of_every_linear_weight(model: str) -> None:
    sizes = _letters(model)
    linears = 2 * sizes.h * (sizes.a + sizes.k) + 3 * sizes.h * sizes.f
    seen = _trace(model, precision="amp_bf16")
    kept = (seen.kinds[kind] for kind in seen.backward_saved)
    copies = sum(
        kind.size[0]
        for kind in kept
        if kind.site == INNER_LAYER and kind.name.endswith("weight, autocast to bfloat16")
    )
    assert copies == 2 * linears


@pytest.mark.parametrize("model", OWN_HEADS)
@pytest.mark.parametrize(("precision", "before_h"), [("bf16", 8), ("fp32", 12)])
def test_the_final_norm_saves_what_the_closed_form_says(
    precision: str, before_h: int, model: str
) -> None:
    """In fp32 each norm saves its input itself, so one more input is saved than there are layers.

    The trace counts an input where it was made: that one is the output of the embeddings.
    """
    seen = _trace(model, precision=precision)
    ends = _saved(seen, seen.sites.index("final_norm")) + _saved(seen, 0)
    assert ends == before_h * _letters(model).h + 4


@pytest.mark.parametrize("model", OWN_HEADS)
@pytest.mark.parametrize(("precision", "width"), [("bf16", 2), ("fp32", 4)])
def test_cosines_and_sines_are_kept_once_for_all_layers(
    precision: str, width: int, model: str
) -> None:
    sizes = _letters(model)
    seen = _trace(model, precision=precision)
    assert _saved(seen, 0, monomial=2) == 2 * (sizes.a // sizes.H) * width


@pytest.mark.parametrize("model", GROUPED_HEADS)
@pytest.mark.parametrize(
    ("recipe", "before_h"),
    [
        ({"precision": "bf16"}, 2),
        ({"precision": "amp_bf16"}, 4),
        ({**FP32_ADAPTERS, **PREPARED}, 4),
    ],
    ids=["bf16", "amp_bf16", "QLoRA after k-bit preparation"],
)
def test_a_checkpointed_layer_keeps_its_input_only(
    recipe: dict[str, Any], before_h: int, model: str
) -> None:
    seen = _trace(model, activation_checkpointing="full", **recipe)
    assert _saved(seen, INNER_LAYER) == before_h * _letters(model).h


@pytest.mark.parametrize("model", GROUPED_HEADS)
@pytest.mark.parametrize("recipe", ADAPTED)
def test_a_layer_with_adapters_saves_what_the_closed_form_says(recipe: str, model: str) -> None:
    request, core, before_n, before_r = ADAPTED[recipe]
    sizes = _letters(model)
    inputs = (sizes.h, sizes.h, sizes.h, sizes.a, sizes.h, sizes.h, sizes.f)
    adapters = sum(before * n for before, n in zip(before_n, inputs, strict=True))
    ranks = 7 * before_r * 16
    assert _saved(_trace(model, **request), INNER_LAYER) == sizes.form(core) + adapters + ranks


@pytest.mark.parametrize(
    ("recipe", "in_units_of_h"),
    [
        ("fp32 adapters", 68.0),
        ("bf16 adapters", 42.3),
        ("bf16 adapters, dropout", 59.0),
        ("QLoRA, dropout", 75.5),
    ],
)
def test_adapters_on_the_measured_toy_save_what_was_measured(
    recipe: str, in_units_of_h: float
) -> None:
    """Qwen1.5-0.5B has the shape of the toy: h = a = k = 1024, f = 2816, 16 heads."""
    seen = _trace("Qwen/Qwen1.5-0.5B", **ADAPTED[recipe][0])
    assert _saved(seen, INNER_LAYER) / 1024 == pytest.approx(in_units_of_h, abs=0.05)


# -- the loss ----------------------------------------------------------------------------------


def _logits(seen: Trace, live: Live, model: str) -> int:
    """Return the bytes of everything of the size of the logits, for one token and word."""
    vocab = _config(model)["vocab_size"]
    return sum(
        count * seen.kinds[kind].dtype.width
        for kind, count in live.items()
        if seen.kinds[kind].shape[:2] == (BATCH, SEQ) and seen.kinds[kind].shape[-1].value == vocab
    )


def _highest(seen: Trace, phase: str, model: str) -> int:
    sites = seen.forward if phase == "forward" else seen.backward
    return max(_logits(seen, each.live, model) for _, site in sites for each in site)


@pytest.mark.parametrize("model", OWN_HEADS)
@pytest.mark.parametrize(("precision", "peak"), [("bf16", 10), ("fp32", 8)])
def test_the_loss_holds_this_many_bytes_for_a_token_and_word_in_forward(
    precision: str, peak: int, model: str
) -> None:
    assert _highest(_trace(model, precision=precision), "forward", model) == peak


@pytest.mark.parametrize("model", GROUPED_HEADS)
@pytest.mark.parametrize(("keep_outputs", "peak"), [(False, 12), (True, 14)])
def test_the_loss_holds_this_many_bytes_for_a_token_and_word_in_backward(
    keep_outputs: bool, peak: int, model: str
) -> None:
    seen = _trace(model, loop={"keep_outputs": keep_outputs})
    assert _highest(seen, "backward", model) == peak


@pytest.mark.parametrize("model", GROUPED_HEADS)
@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        ({"precision": "bf16"}, 4),
        ({"precision": "bf16", "loop": {"keep_outputs": True}}, 4 + 2),
        ({"precision": "amp_bf16", "loop": {"keep_outputs": True}}, 4 + 4),
    ],
    ids=["Trainer", "outputs kept", "outputs kept under Accelerate"],
)
def test_between_forward_and_backward_the_loss_keeps_its_log_probabilities(
    recipe: dict[str, Any], kept: int, model: str
) -> None:
    seen = _trace(model, **recipe)
    assert _logits(seen, seen.backward_saved, model) == kept
