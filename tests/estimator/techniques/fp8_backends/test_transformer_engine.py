"""Transformer Engine's layers: which are taken over, what stays, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Linear, Module
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate
from tests.conformance.cases import MODELS


def _resolved(config: dict[str, Any], **document: Any) -> Any:
    request = parse_request({"model": {"config": config}, "fp8": "te", **document})
    return resolve(request, config, "m")


def _ours(config: dict[str, Any]) -> set[str]:
    found = set()

    def see(module: Module, path: str) -> Module:
        if isinstance(module, Linear) and module.product:
            found.add(path)
        return module

    _resolved(config).spec.map_paths(see, every_layer=True)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["llama", "llama-mha", "qwen3", "gemma2", "phi3"])
def test_the_layers_are_those_that_accelerate_converts(model):
    """Accelerate's own function decides; in "llama" it gives up in the middle of each MLP."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from profiler import workload
    from profiler.transformer_engine import Linear as StandIn

    config = MODELS[model]
    request = parse_request({"model": {"config": config}, "fp8": "te"})
    real = workload.meta_model(request, workload.model_config(config))
    theirs = {path for path, module in real.named_modules() if isinstance(module, StandIn)}
    assert _ours(config) == theirs != set()


def test_the_state_of_one_layer_is_that_of_delayed_scaling():
    """scale [3] and amax_history [1024, 3] forward, [2] and [1024, 2] backward, all fp32."""
    spec = _resolved(MODELS["llama-mha"]).spec
    layer = next(each for each, _ in spec.module_counts() if isinstance(each, Linear))
    kept = {each.name: each.bytes for each in layer.weights() if each.name != "weight"}
    assert kept == {
        "scaling_fwd.scale": 12,
        "scaling_fwd.amax_history": 12288,
        "scaling_bwd.scale": 8,
        "scaling_bwd.amax_history": 8192,
    }


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("gpt2", {}, "LayerNorm"),
        ("qwen2", {}, "bias"),
        ("llama-mha", {"method": "lora"}, "wants a gradient"),
        ("llama-mha", {"activation_checkpointing": "selective_op"}, "use .* full"),
    ],
)
def test_what_has_no_source_is_refused_by_name(model, changes, said):
    with pytest.raises(UnsupportedCombinationError, match=said):
        _resolved(MODELS[model], **changes)


def test_a_tied_head_that_would_come_apart_is_refused():
    with pytest.raises(UnsupportedCombinationError, match="unknown to the optimizer"):
        _resolved({**MODELS["llama-tied"], "vocab_size": 32000})


def test_tokens_and_cards_that_it_does_not_take_are_refused():
    document = {"model": "meta-llama/Llama-3.1-8B", "fp8": "te"}
    with pytest.raises(InvalidRequestError, match="multiples of 8"):
        estimate({**document, "seq_len": 1001})
    with pytest.raises(UnsupportedCombinationError, match="Blackwell"):
        estimate({**document, "hardware": "b200"})
