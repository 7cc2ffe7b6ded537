"""LLM.int8(): what a layer stores, against bitsandbytes' own layer, and what its backward keeps."""

from __future__ import annotations

import weakref

import pytest

from estimator.dtypes import DType
from estimator.eager.size import dim
from estimator.errors import InvalidRequestError, UnsupportedCombinationError
from estimator.model.spec import Linear
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.techniques.quantizations.int8 import EightBit

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 101,
}  # fmt: skip


def _run(config=LLAMA, **quantization):
    document = {"model": "m", "method": "lora", "quantization": {"name": "int8", **quantization}}
    return resolve(parse_request(document), config, "m")


@pytest.mark.parametrize(("fan_in", "fan_out"), [(64, 96), (96, 40), (128, 128)])
def test_a_layer_stores_what_bitsandbytes_stores(fan_in, fan_out):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = bitsandbytes.nn.Linear8bitLt(fan_in, fan_out, bias=False, has_fp16_weights=False)
    real = real.to("cpu")
    ours = Linear(name="l", fan_in=dim("k", fan_in), fan_out=dim("n", fan_out), dtype=DType.FLOAT16)
    stored = {each.name: each for each in EightBit().weights(ours)}
    assert stored["weight"].bytes == real.weight.CB.nbytes
    assert stored["weight.SCB"].bytes == real.weight.SCB.nbytes
    assert sum(each.parameters for each in stored.values()) == fan_in * fan_out


@pytest.mark.filterwarnings("ignore")
def test_the_real_function_holds_its_input_until_the_graph_goes():
    """What `EightBit.forward` says of upstream, on upstream's own code."""
    torch = pytest.importorskip("torch")
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    state = functions.MatmulLtState()
    state.has_fp16_weights = False
    state.CB, state.SCB = torch.ones(8, 4, dtype=torch.int8), torch.ones(8)
    leaf = torch.ones(2, 4, dtype=torch.float16, requires_grad=True)
    tensor = leaf * 2
    loss = functions.MatMul8bitLt.apply(tensor, state.CB, None, None, state).sum()
    storage = weakref.ref(tensor.untyped_storage())
    del tensor
    loss.backward()
    assert storage() is not None
    del loss
    assert storage() is None


def test_only_the_head_keeps_its_width():
    spec = _run().spec
    plain = {m.name for m, _ in spec.module_counts() if isinstance(m, Linear) and m.format is None}
    assert plain == {"lm_head"}


def test_skipped_modules_keep_their_width_too():
    spec = _run(skip_modules=["lm_head", "down_proj"]).spec
    plain = {m.name for m, _ in spec.module_counts() if isinstance(m, Linear) and m.format is None}
    assert plain == {"lm_head", "mlp.down_proj"}


def test_skipping_without_the_head_is_refused_because_transformers_would_pack_it():
    with pytest.raises(UnsupportedCombinationError, match="lm_head"):
        _run(skip_modules=["down_proj"])


def test_a_name_that_no_layer_ends_in_is_refused():
    with pytest.raises(InvalidRequestError, match="self_attn"):
        _run(skip_modules=["lm_head", "self_attn"])


def test_a_width_that_is_no_multiple_of_four_is_refused_by_the_step():
    from estimator.pipeline import answer

    config = {**LLAMA, "intermediate_size": 98}
    document = {"model": "m", "method": "lora", "quantization": "int8", "seq_len": 8}
    with pytest.raises(UnsupportedCombinationError, match="98"):
        answer(parse_request(document), config, "m", None)


def test_the_answer_says_that_checkpointing_does_not_free_the_inputs():
    assert any("does not free" in note for note in _run().spec.notes)
