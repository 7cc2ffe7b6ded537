"""Making a model on the device: what sources print of it, and what it does to an answer."""

from __future__ import annotations

import pytest

from estimator.catalog import Access, find_model
from estimator.memory.allocator import charge
from estimator.memory.caching_allocator import CachingAllocator
from estimator.memory.loading import LOADING, loading
from estimator.memory.standing import model_entries
from estimator.model.loading import EMPTIED
from estimator.pipeline import device_of, engine_for
from estimator.request import parse_request
from estimator.resolve import resolve
from estimator.service import estimate

LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"
EVERY = ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")
NF4 = {"name": "nf4", "prepare_kbit": False}


def torchtune(version, targets=("q_proj", "v_proj"), **fields):
    method = {"name": "lora", "r": 8, "target_modules": list(targets), "adapter_dtype": "base"}
    return {
        "model": LLAMA_2_7B,
        "method": method,
        "software": {"framework": "torchtune", "version": version},
        **fields,
    }


def run_of(document):
    request = parse_request(document)
    return resolve(request, find_model(request.model, Access.CATALOGUE).config, request.model)


def loaded(run):
    allocator = CachingAllocator()
    for event in loading(run):
        if event is EMPTIED:
            allocator.empty_cache()
        elif event.size is None:
            allocator.free(event.serial)
        else:
            allocator.malloc(event.serial, event.size)
    return allocator.stats


# torchtune, docs/source/tutorials/qlora_finetune.rst at 0914d5cfb: memory after model init.
@pytest.mark.parametrize(
    ("document", "allocated_gb", "reserved_gb"),
    [
        (torchtune("0.1"), 13.96, 13.98),
        (torchtune("0.1", EVERY, quantization=NF4), None, 9.13),
    ],
    ids=["lora", "qlora"],
)
def test_making_the_model_takes_what_the_tutorial_prints(document, allocated_gb, reserved_gb):
    stats = loaded(run_of(document))
    assert stats.peak_reserved_bytes / 1e9 == pytest.approx(reserved_gb, abs=0.01)
    if allocated_gb is not None:
        assert stats.peak_allocated_bytes / 1e9 == pytest.approx(allocated_gb, abs=0.005)


def test_a_packed_layer_holds_what_the_tutorial_prints():
    # The same tutorial: LoRALinear(512, 512, rank=8, quantize_base=True) takes 177,152 bytes, two
    # adapters in fp32 among them.
    run = run_of(torchtune("0.1", EVERY, quantization=NF4))
    linear = run.spec.kinds[0].modules[0]
    side = type(linear.fan_in)("512", 512)
    small = type(linear)(name="q_proj", fan_in=side, fan_out=side, format=linear.format)
    packed = sum(charge(each.bytes) for each in linear.format.weights(small))
    assert packed + 2 * 4 * 8 * 512 == 177_152


@pytest.mark.parametrize(
    "document",
    [
        torchtune("0.1", EVERY, quantization=NF4),
        torchtune("0.3", EVERY, quantization=NF4),
        torchtune("0.6", EVERY, quantization=NF4),
        torchtune("0.6"),
        {"model": LLAMA_2_7B},
        {"model": "gpt2"},
        {"model": LLAMA_2_7B, "software": {"framework": "trl", "version": "1.16"}},
        {"model": "gpt2", "software": {"framework": "trl", "version": "1.3"}, "method": "lora"},
        {
            "model": LLAMA_2_7B,
            "software": {"framework": "trl", "version": "0.27"},
            "method": "qlora",
        },
        {"model": LLAMA_2_7B, "method": "qlora"},
        {"model": LLAMA_2_7B, "method": "lora", "quantization": {"name": "int8"}},
    ],
    ids=lambda document: f"{document.get('software', {}).get('version')} {document.get('method')}",
)
def test_what_is_left_when_the_model_is_there_are_its_weights_and_buffers(document):
    run = run_of(document)
    standing = sum(each.row.size[0] * each.count for each in model_entries(run))
    left: dict[int, int] = {}
    for event in loading(run):
        if event.size is None:
            left.pop(event.serial, None)
        else:
            left[event.serial] = event.size
    assert sum(left.values()) == standing


def test_an_answer_says_how_it_takes_the_model_to_be_loaded():
    packed = estimate({"model": LLAMA_2_7B, "method": "qlora"})
    assert any("packs a checkpoint of whole weights on the GPU" in x for x in packed.assumptions)
    plain = estimate({"model": LLAMA_2_7B})
    assert any("made on the host and moved to the GPU" in x for x in plain.assumptions)
    assert not any("loading:" in each for each in estimate(torchtune("0.6")).assumptions)
    named = estimate({"model": LLAMA_2_7B, "software": "trl"})
    assert any("loads it straight to the GPU" in each for each in named.assumptions)


@pytest.mark.parametrize("version", ["5", "4"])
def test_weights_raised_for_training_are_there_twice_one_at_a_time(version):
    # The largest is the table of embeddings, 32000 x 4096: with it raised, its 2 bytes are still
    # there, and head and norms are in both types one after the other.
    document = {"model": LLAMA_2_7B, "method": "qlora", "software": {"version": version}}
    result = estimate(document)
    moment = result.timeline[0]
    assert moment.moment == LOADING
    standing = sum(
        each.row.size[0] * each.count
        for each in model_entries(run_of(document))
        if ".lora_" not in each.row.name
    )
    there = moment.components["weights"] + moment.components.get("buffers", 0)
    assert there - standing == 2 * 32000 * 4096


# -- a job that is too large to be loaded ------------------------------------------------------

# torchao of April 2024 compares every value with 16 others at once, and short batches need less.
SHORT = torchtune("0.1", EVERY, quantization=NF4, seq_len=16, micro_batch_size=1)


def test_loading_can_be_the_peak_and_its_rows_add_up_to_it():
    result = estimate(SHORT)
    assert result.peak.moment == LOADING == result.timeline[0].moment
    rows = [row for part in result.breakdown for row in part.rows]
    assert sum(row.bytes for row in rows) == result.peak.allocated_bytes.expected
    assert result.timeline[0].bytes == result.peak.allocated_bytes.expected
    # No library has its workspace before the first product, and no optimizer its states.
    assert not [row for row in rows if row.name.startswith("cuBLAS")]
    assert "optimizer_states" not in result.timeline[0].components


def test_a_job_that_cannot_be_loaded_is_not_told_that_it_fits():
    result = estimate(SHORT)
    step = max(each.bytes for each in result.timeline if each.moment != LOADING)
    context = next(row.bytes for row in result.outside if row.name.startswith("CUDA context"))
    enough_to_train = int(1.2 * step) + context
    assert enough_to_train < result.peak.allocated_bytes.expected + context
    judged = estimate({**SHORT, "hardware": {"memory_bytes": enough_to_train}})
    assert judged.verdict == "does_not_fit"


def test_what_loading_asks_for_is_among_the_requests_of_a_run():
    request = parse_request(SHORT)
    engine = engine_for(request, find_model(LLAMA_2_7B, Access.CATALOGUE).config, LLAMA_2_7B)
    asked = [
        each
        for each in engine.requests(1, 16, device_of(None, request))
        if each.name == "their absolute values"
    ]
    assert {each.turn for each in asked} == {"load"}
    assert max(each.size_bytes for each in asked) == 16 * 2 * 4096 * 11008
