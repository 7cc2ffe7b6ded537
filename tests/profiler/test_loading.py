"""transformers' own loading of a checkpoint, watched storage by storage, beside what we replay."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    modeling_utils,
)

from estimator.memory.loading import loading
from estimator.request import parse_request
from estimator.resolve import resolve

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
    "max_position_embeddings": 128,
}


class Storages(TorchDispatchMode):
    """Bytes of the storages that operators return, now and at their most.

    What safetensors reads into lies on the host, wherever the model is.
    """

    def __init__(self):
        super().__init__()
        self.total = self.highest = 0
        self.seen = {}

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                is_read = func is torch.ops.aten.set_.source_Storage
                self.see(each.untyped_storage(), 0 if is_read else each.untyped_storage().nbytes())
        return out

    def see(self, storage, size):
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = size
        self.total += size
        self.highest = max(self.highest, self.total)
        weakref.finalize(storage, self.died, key)

    def died(self, key):
        self.total -= self.seen.pop(key)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


def watched(folder, quantization):
    """Load in bf16, so that each tensor is made by an operator, and return what was there."""
    gc.collect()
    gc.disable()
    try:
        with Storages() as storages:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                device_map={"": "cpu"},
                quantization_config=quantization,
            )
            highest, left = storages.highest, storages.total
        del model
        return highest, left
    finally:
        gc.enable()


def events(quantization):
    """Return the sequence that we replay."""
    config = {"model_type": "llama", **SIZES}
    document = {
        "model": {"config": config},
        "method": {"name": "lora", "r": 8},
        "quantization": quantization and {**quantization, "prepare_kbit": False},
        "software": "trl",
        "precision": "bf16",
    }
    return loading(resolve(parse_request(document), config, "llama"))


def replayed(quantization):
    """Return what it has at most and in the end, without the memory asked for at once."""
    total = highest = 0
    sizes = {}
    for event in events(quantization):
        if event.name == "memory asked for at once" or "lora_" in event.name:
            continue
        if event.size is None:
            total -= sizes.pop(event.serial, 0)
        else:
            sizes[event.serial] = event.size
            total += event.size
            highest = max(highest, total)
    return highest, total


@pytest.mark.parametrize(
    ("asked", "ours"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), {"name": "nf4"}),
        (BitsAndBytesConfig(load_in_8bit=True), {"name": "int8"}),
        (None, None),
    ],
    ids=["nf4", "int8", "plain"],
)
def test_the_memory_asked_for_at_once_is_what_transformers_counts(
    checkpoint, monkeypatch, asked, ours
):
    counted = {}

    def count(model, devices, quantizer):
        on_gpu = dict.fromkeys(devices, torch.device("cuda"))
        counted.update(modeling_utils.get_total_byte_count(model, on_gpu, quantizer))
        raise StopIteration

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", count)
    with pytest.raises(StopIteration):
        watched(checkpoint, asked)
    (at_once,) = (each.size for each in events(ours) if each.name.endswith("at once"))
    assert at_once == counted[torch.device("cuda")]


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bit_weights_take_what_transformers_takes_to_load_them(checkpoint, double_quant):
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    highest, left = watched(checkpoint, asked)
    ours = replayed({"name": "nf4", "double_quant": double_quant})
    # Scratch of a megabyte and less is left out: scales before and after their mean is subtracted.
    assert ours[0] == pytest.approx(highest, rel=0.015 if double_quant else 0.002)
    assert ours[1] == pytest.approx(left, rel=0.002)
