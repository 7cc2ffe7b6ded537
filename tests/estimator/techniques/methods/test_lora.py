"""LoRA's knobs against PEFT: what it counts, what it stores, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.request import parse_request
from estimator.resolve import resolve
from tests.conformance.cases import MODELS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
]

FAMILIES = ("qwen2", "gpt2", "opt")
EACH = {
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc1", "fc2"],
}
FIRST = {"qwen2": "q_proj", "gpt2": "c_attn", "opt": "q_proj"}
TABLE = {"qwen2": "embed_tokens", "gpt2": "wte", "opt": "embed_tokens"}
NORM = {"qwen2": "norm", "gpt2": "ln_1", "opt": "self_attn_layer_norm"}


def _document(family: str, **knobs: Any) -> dict[str, Any]:
    return {"model": {"config": MODELS[family]}, "method": {"name": "lora", "r": 12, **knobs}}


def _ours(document: dict[str, Any]) -> tuple[int, int]:
    spec = resolve(parse_request(document), document["model"]["config"], "model").spec
    return spec.trainable_parameters(), spec.total_parameters()


def _counted_by_peft(document: dict[str, Any]) -> tuple[int, int]:
    from profiler import workload

    request = parse_request(document)
    model = workload.meta_model(request, workload.model_config(document["model"]["config"]))
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)


KNOBS: dict[str, Any] = {
    "head saved": lambda _: {"modules_to_save": ["lm_head"]},
    "embeddings saved": lambda family: {"modules_to_save": [TABLE[family]]},
    "both saved": lambda family: {"modules_to_save": ["lm_head", TABLE[family]]},
    "norms saved": lambda family: {"modules_to_save": [NORM[family]]},
    "every bias": lambda _: {"bias": "all"},
    "biases of its layers": lambda family: {"bias": "lora_only", "target_modules": EACH[family]},
    "dora": lambda _: {"use_dora": True},
    "dora on some layers": lambda family: {"use_dora": True, "target_modules": EACH[family]},
    "bias of B": lambda _: {"lora_bias": True},
    "two layers": lambda family: {
        "target_modules": EACH[family], "layers_to_transform": [1, 3],
    },
    "a layer by its path": lambda family: {
        "target_modules": [f"2.{'self_attn.q_proj' if family != 'gpt2' else 'attn.c_attn'}"],
    },
    "other ranks": lambda family: {"rank_pattern": {FIRST[family]: 64}},
    "another rank in one layer": lambda family: {
        "rank_pattern": {rf".*\.1\..*{FIRST[family]}": 64},
    },
    "some left out": lambda family: {"exclude_modules": EACH[family][:1]},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_parameters_are_those_that_peft_counts(knobs: Any, family: str) -> None:
    document = _document(family, **knobs(family))
    assert _ours(document) == _counted_by_peft(document)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal"])
def test_every_initialization_leaves_tensors_of_the_same_size(init: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from profiler import workload

    def tensors(start: bool | str) -> dict[str, tuple[Any, Any, bool]]:
        model = workload.bare_model(
            parse_request(_document("llama")), workload.model_config(MODELS["llama"])
        )
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(r=12, init_lora_weights=start))
        return {
            name: (each.shape, each.dtype, each.requires_grad)
            for name, each in adapted.named_parameters()
        }

    assert tensors(init) == tensors(True)


@pytest.mark.parametrize(
    "knobs",
    [
        {"layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_pattern": ["layers"]},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"lora_bias": True, "use_dora": True},
        {"target_modules": ["no_such_layer"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [77]},
    ],
)
def test_what_peft_refuses_is_refused(knobs: dict[str, Any]) -> None:
    document = _document("llama", **knobs)
    with pytest.raises(InvalidRequestError):
        _ours(document)
    if "init_lora_weights" not in knobs:
        with pytest.raises(InvalidRequestError):
            _counted_by_peft(document)


def test_a_packed_layer_cannot_be_saved_in_full() -> None:
    document = {**_document("llama", modules_to_save=["q_proj"]), "quantization": "nf4"}
    with pytest.raises(InvalidRequestError, match="q_proj is quantized"):
        _ours(document)


def test_a_trained_bias_of_a_packed_layer_is_refused_by_name() -> None:
    document = {**_document("qwen2", bias="all"), "quantization": "nf4"}
    with pytest.raises(UnsupportedCombinationError, match="trained bias"):
        _ours(document)


def test_a_saved_module_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedCombinationError, match="classifier"):
        _ours(_document("llama", modules_to_save=["classifier"]))


@pytest.mark.parametrize(
    ("word", "knobs", "quantization"),
    [
        ("rslora", {"use_rslora": True}, None),
        ("pissa", {"init_lora_weights": "pissa"}, None),
        ("loftq", {"init_lora_weights": "loftq"}, "nf4"),
        ("lora+", {"loraplus_lr_ratio": 16.0}, None),
        ("qlora", {}, "nf4"),
        ("dora", {"use_dora": True}, None),
        ("qdora", {"use_dora": True}, "nf4"),
    ],
)
def test_a_word_stands_for_lora_with_its_knobs(
    word: str, knobs: dict[str, Any], quantization: str | None
) -> None:
    written = {"model": "gpt2", "method": {"name": "lora", **knobs}, "quantization": quantization}
    assert parse_request({"model": "gpt2", "method": word}) == parse_request(written)


def test_a_knob_beside_the_word_wins() -> None:
    method = parse_request({"model": "gpt2", "method": {"name": "lora+", "loraplus_lr_ratio": 4}})
    assert method.method.to_dict()["loraplus_lr_ratio"] == 4


def test_dora_over_integers_is_refused_by_name() -> None:
    from estimator.pipeline import answer

    document = {**_document("llama", use_dora=True), "quantization": "int8"}
    with pytest.raises(UnsupportedCombinationError, match="DoRA over this quantization"):
        answer(parse_request(document), MODELS["llama"], "model", None)


def test_the_norm_of_dora_takes_the_copies_that_its_source_makes() -> None:
    from estimator.eager.tensor import Regime
    from estimator.memory.trace import record_layers

    document = _document("llama", use_dora=True, target_modules=["o_proj"])
    run = resolve(parse_request(document), MODELS["llama"], "model")
    recording = record_layers(run, Regime(), (0,))
    square = 1152 * 1152 * 4  # o_proj of this model is square; every copy is fp32
    names = [
        kind.name.rpartition("o_proj.")[2] for kind in recording.kinds if kind.size == (square, 0)
    ]
    # peft 0.21.2, tuners/lora/dora.py: x_eye, lora_B(lora_A(x_eye)), weight.to, scaling * BA, sum
    assert names == [
        "identity", "lora_B.output", "base weight, cast", "scaled BA", "adapted weight",
    ]  # fmt: skip
