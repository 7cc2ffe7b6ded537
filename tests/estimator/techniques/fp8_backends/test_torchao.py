"""torchao's float8 training: which layers it takes over and what they save, against torchao."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Linear, Module
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from tests.conformance.cases import MODELS

LLAMA = MODELS["llama-mha"]
FAMILIES = (
    "llama", "llama-tied", "qwen2", "gemma3", "phi3", "starcoder2", "gpt_neox", "opt", "falcon",
    "bloom",
)  # fmt: skip


def _resolved(config: dict[str, Any], **document: Any) -> Any:
    request = parse_request({"model": {"config": config}, "fp8": "torchao", **document})
    return resolve(request, config, "m")


def _ours(config: dict[str, Any], **document: Any) -> set[str]:
    """Return the paths of the layers that we take over, adapters included."""
    found = set()

    def see(module: Module, path: str) -> Module:
        if isinstance(module, Linear):
            adapter = module.adapter
            if module.product:
                found.add(f"base_model.model.{path}.base_layer" if adapter else path)
            for name in ("down", "up"):
                if adapter and getattr(adapter, f"{name}_product"):
                    letter = {"down": "A", "up": "B"}[name]
                    found.add(f"base_model.model.{path}.lora_{letter}.default")
        return module

    _resolved(config, **document).spec.map_paths(see, every_layer=True)
    return found


def _theirs(config: dict[str, Any], **document: Any) -> set[str]:
    """Return the paths of the layers that Accelerate and torchao take over."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from profiler import workload

    request = parse_request({"model": {"config": config}, "fp8": "torchao", **document})
    model = workload.meta_model(request, workload.model_config(config))
    return {
        path for path, module in model.named_modules() if type(module).__name__ == "Float8Linear"
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_those_that_accelerate_converts(family):
    pytest.importorskip("torchao.float8")
    pytest.importorskip("accelerate")
    assert _ours(MODELS[family]) == _theirs(MODELS[family]) != set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("r", "filter_fqns"),
    [(12, None), (16, None), (16, ["lm_head", "q_proj"]), (16, ["lora_A"]), (16, ["base_layer"])],
)
def test_with_lora_the_layers_are_those_that_accelerate_converts(r, filter_fqns):
    pytest.importorskip("torchao.float8")
    pytest.importorskip("peft")
    changes = {
        "method": {"name": "lora", "r": r},
        "fp8": {"name": "torchao", "filter_fqns": filter_fqns},
    }
    assert _ours(LLAMA, **changes) == _theirs(LLAMA, **changes) != set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trained", [True, False])
def test_the_real_layer_saves_input_and_weight_as_they_are(trained):
    """What `float8.linear` says of upstream, on upstream's own code."""
    torch = pytest.importorskip("torch")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    float8 = pytest.importorskip("torchao.float8")
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: list[Any] = []
    with FakeTensorMode():
        inner = torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
        inner.requires_grad_(trained)
        layer = float8.convert_to_float8_training(torch.nn.Sequential(inner))
        x = torch.ones(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda each: each):
            layer(x)
    assert [(tuple(each.shape), each.dtype) for each in saved] == [
        ((2, 16, 64), torch.bfloat16),
        ((64, 96), torch.bfloat16),
    ]


def test_weights_gradients_and_states_keep_their_width():
    document = {"model": "meta-llama/Llama-3.2-1B", "optimizer": "adamw_torch"}
    plain, eight = estimate(document), estimate({**document, "fp8": "torchao"})
    for component in ("weights", "gradients", "optimizer_states"):
        found = [
            next(m.components[component] for m in each.timeline if m.moment == "optimizer step")
            for each in (plain, eight)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("gpt2", {}, "finds no nn.Linear"),
        ("llama-mha", {"method": "qlora"}, "quantized"),
        ("llama-mha", {"method": "dora"}, "plain LoRA"),
        ("llama-mha", {"method": "p_tuning"}, "module of the method's own"),
        ("llama-mha", {"method": "mezo", "optimizer": "sgd"}, "without backward"),
        ("llama-mha", {"method": {"name": "lora", "modules_to_save": ["q_proj"],
         "target_modules": ["v_proj"]}}, "modules_to_save"),
        ("llama-mha", {"fp8": "mxfp8"}, "use 'torchao'"),
        ("llama-mha", {"quantization": "fp8", "fp8": None}, "ask for field fp8"),
    ],
)  # fmt: skip
def test_what_has_no_source_is_refused_by_name(model, changes, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _resolved(MODELS[model], **changes)


def test_a_head_in_8_bits_and_a_loss_that_reads_its_weight_are_refused():
    config = {**LLAMA, "vocab_size": 32000}
    changes = {"fp8": {"name": "torchao", "filter_fqns": []}, "loss": "chunked"}
    with pytest.raises(UnsupportedCombinationError, match="product in 8 bits"):
        _resolved(config, **changes)


def test_a_card_without_8_bit_products_is_refused():
    document = {"model": "meta-llama/Llama-3.2-1B", "fp8": "torchao"}
    with pytest.raises(InvalidRequestError, match=r"8\.9"):
        estimate({**document, "hardware": "a100-80gb"})
    assert estimate({**document, "hardware": "rtx-4090"}).verdict != "unknown"


def test_tokens_that_the_kernel_does_not_take_are_refused_without_padding():
    document: dict[str, Any] = {
        "model": "meta-llama/Llama-3.2-1B", "seq_len": 1000, "micro_batch_size": 3,
        "fp8": {"name": "torchao", "pad_inner_dim": False},
    }  # fmt: skip
    with pytest.raises(InvalidRequestError, match="multiples of 16"):
        estimate(document)
    kept = {"name": "torchao", "pad_inner_dim": False, "recipe": "rowwise_with_gw_hp"}
    assert estimate({**document, "fp8": kept}).peak.allocated_bytes.expected > 0


def test_accelerates_spelling_is_accepted():
    assert (
        parse_request({"model": "m", "fp8": "AO"}).fp8
        == parse_request({"model": "m", "fp8": "torchao"}).fp8
    )
