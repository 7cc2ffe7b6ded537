"""The Trainer's callback: what it says before the first step, and what it makes of the steps."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from estimator.errors import InvalidRequestError
from estimator.record import read
from estimator.request import parse_request
from estimator.service import estimate
from profiler.callback import DoesNotFitError, MemoryPreflight
from profiler.live.device import CudaMeter, Look, capacity, meter_of, unknown_tensors
from tests.profiler import live_runs
from tests.profiler.live_runs import FakeMeter, llama, samples, trainer

# The stack's warnings are about code that is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOMY = 2**32
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def said(caplog, monkeypatch):
    """Return the callback's messages of one level."""
    # Import Linter, in a test of its own, switches off every logger that is there already.
    monkeypatch.setattr(logging.getLogger("profiler.callback"), "disabled", False)
    caplog.set_level(logging.INFO, logger="profiler.callback")

    def of(level: str) -> list[str]:
        return [
            each.getMessage()
            for each in caplog.records
            if each.name == "profiler.callback" and each.levelname == level
        ]

    return of


def _needed() -> Any:
    """Return what the tiny run needs, judged by nothing."""
    return estimate(
        {
            "model": {"config": {**live_runs.LLAMA, "model_type": "llama"}},
            "precision": "fp32", "optimizer": "adamw_torch_fused", "micro_batch_size": 2,
            "seq_len": 16,
        }
    ).peak  # fmt: skip


def test_a_run_that_fits_is_told_without_a_warning(tmp_path, said):
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), steps=0)
    trainer(tmp_path, callback, llama()).train()
    assert said("WARNING") == []
    assert said("INFO")[0].startswith("memory: Fits: needs ")
    assert callback.result.verdict == "fits"
    assert callback.result.peak.needed_bytes == _needed().needed_bytes


def test_a_tight_run_is_warned_of_and_goes_on(tmp_path, said):
    peak = _needed()
    context = peak.device_used_bytes.low - peak.reserved_bytes.low
    between = (peak.needed_bytes.low + peak.needed_bytes.high) // 2 - context
    callback = MemoryPreflight(meter=FakeMeter(between), on_misfit="stop", steps=0)
    run = trainer(tmp_path, callback, llama())
    run.train()
    assert run.state.global_step == 3
    assert said("WARNING")[0].startswith("memory: Tight: needs ")


def test_a_run_that_does_not_fit_is_stopped_before_its_first_step(tmp_path):
    model = llama()
    before = [each.clone() for each in model.parameters()]
    run = trainer(tmp_path, MemoryPreflight(meter=FakeMeter(2**20), on_misfit="stop"), model)
    with pytest.raises(DoesNotFitError, match="Does not fit: needs") as caught:
        run.train()
    assert caught.value.exit_code == 1
    assert run.state.global_step == 0
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    assert not model._forward_pre_hooks


def test_a_run_that_does_not_fit_is_warned_of_where_nobody_wants_to_be_stopped(tmp_path, said):
    run = trainer(tmp_path, MemoryPreflight(meter=FakeMeter(2**20), steps=0), llama())
    run.train()
    assert run.state.global_step == 3
    assert said("WARNING")[0].startswith("memory: Does not fit: needs ")


def test_another_model_than_the_estimate_counts_is_told_and_never_stopped(tmp_path, said):
    import torch

    model = llama()
    counted = sum(each.numel() for each in model.parameters())
    model.own = torch.nn.Parameter(torch.zeros(5))
    callback = MemoryPreflight(meter=FakeMeter(2**20), on_misfit="stop", steps=0)
    run = trainer(tmp_path, callback, model)
    run.train()
    assert run.state.global_step == 3
    (warning,) = said("WARNING")
    assert f"it counts {counted} parameters, {counted} of them trainable" in warning
    assert f"the live model has {counted + 5} and {counted + 5}" in warning


def test_what_cannot_be_estimated_stops_nothing(tmp_path, said):
    model = llama()
    model.model.layers[1].requires_grad_(False)
    callback = MemoryPreflight(meter=FakeMeter(2**20), on_misfit="stop")
    run = trainer(tmp_path, callback, model)
    run.train()
    assert run.state.global_step == 3
    assert len(said("WARNING")) == 1
    assert said("WARNING")[0].startswith("memory: cannot estimate: the request document has no ")
    assert "frozen without PEFT" in said("WARNING")[0]
    assert callback.result is None


def test_a_meter_that_fails_stops_nothing(tmp_path, said):
    meter = FakeMeter(ROOMY)
    meter.look = lambda: 1 // 0
    run = trainer(tmp_path, MemoryPreflight(meter=meter), llama())
    run.train()
    assert run.state.global_step == 3
    assert "ZeroDivisionError" in said("WARNING")[0]


def test_on_the_cpu_nothing_is_measured_and_nothing_is_recorded(tmp_path, said):
    path = tmp_path / "records.jsonl"
    run = trainer(tmp_path, MemoryPreflight(record_to=path), llama())
    assert meter_of(run.model) is None
    run.train()
    assert not path.exists()
    assert said("INFO")[0].startswith("memory: Needs ")
    assert "the model is on cpu, which is no CUDA device" in said("WARNING")[0]
    assert f"nothing is recorded to {path}" in said("WARNING")[0]


def test_the_steps_are_compared_at_the_batches_that_were_seen(tmp_path, said):
    data = samples(*[8] * 2, *[12] * 2, *[10] * 8)
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), request_to=tmp_path / "request.json")
    # The largest batch of the data is 12 tokens long; the sampler is told to keep the order.
    run = trainer(tmp_path, callback, llama(), data, train_sampling_strategy="sequential")
    run.train()
    compared = [each.partition("\n")[0] for each in said("INFO") if "tokens" in each]
    assert compared == [
        "memory: step 1, 2 x 8 tokens; optimizer states are made in this first step",
        "memory: step 2, 2 x 12 tokens",
        "memory: step 3, 2 x 10 tokens",
    ]
    document = json.loads((tmp_path / "request.json").read_text())
    assert (document["seq_len"], document["padding"]) == (12, False)
    assert not run.model._forward_pre_hooks


def test_the_table_says_what_was_predicted_and_measured_by_phase(tmp_path, said):
    expected = estimate_of_the_tiny_run(accumulation=2)
    update = next(each.bytes for each in expected.timeline if each.moment == "optimizer step")
    whole = expected.peak.allocated_bytes.expected
    # At the beginning of the step, before the update, within it, behind it.
    meter = FakeMeter(ROOMY, peaks=(5, 2 * whole, update, 4))
    callback = MemoryPreflight(meter=meter, steps=1)
    trainer(tmp_path, callback, llama(), gradient_accumulation_steps=2).train()
    rows = said("INFO")[-1].splitlines()[2:]
    assert [each[:28].strip() for each in rows] == [
        "forward to gradient clipping", "optimizer step", "step",
    ]  # fmt: skip
    assert [each.split()[-2] for each in rows] == ["+100.00", "+0.00", "+100.00"]
    assert callback.peak.allocated_bytes == 2 * whole
    assert meter.resets == 4


def estimate_of_the_tiny_run(accumulation: int = 1) -> Any:
    """Return the answer to the run of `trainer` with its defaults."""
    return estimate(
        {
            "model": {"config": {**live_runs.LLAMA, "model_type": "llama"}},
            "precision": "fp32", "optimizer": "adamw_torch_fused", "micro_batch_size": 2,
            "seq_len": 16, "gradient_accumulation_steps": accumulation,
        }
    )  # fmt: skip


def test_a_step_outside_the_range_is_pointed_to_reconcile_from_the_second_on(tmp_path, said):
    request = tmp_path / "request.json"
    callback = MemoryPreflight(meter=FakeMeter(ROOMY, peaks=(7,)), steps=2, request_to=request)
    trainer(tmp_path, callback, llama()).train()
    assert said("WARNING") == [
        "memory: step 2 read 7 bytes, which is outside the predicted range; ask why with: "
        f"estimate reconcile --request {request} --measured 7 --meter allocated"
    ]


def test_a_step_inside_the_range_is_no_warning(tmp_path, said):
    expected = estimate_of_the_tiny_run().peak.allocated_bytes.expected
    callback = MemoryPreflight(meter=FakeMeter(ROOMY, peaks=(expected,)), steps=2)
    trainer(tmp_path, callback, llama()).train()
    assert said("WARNING") == []


def test_a_record_comes_back_as_a_run_with_the_request_in_it(tmp_path):
    path = tmp_path / "records.jsonl"
    peaks = (1, 900, 800, 700, 650, 600, 500, 400)
    callback = MemoryPreflight(meter=FakeMeter(ROOMY, peaks=peaks), steps=2, record_to=path)
    trainer(tmp_path, callback, llama()).train()
    (run,) = read(path)
    assert (run.origin, run.group, run.outcome, run.steps) == (
        "simulated", "trainer callback", "ok", 2,
    )  # fmt: skip
    assert run.peak.allocated_bytes == 900
    assert [(each.phase, each.peak.allocated_bytes) for each in run.phases] == [
        ("forward to gradient clipping", 600), ("optimizer step", 500),
    ]  # fmt: skip
    assert len(run.step_seconds) == 2
    request = parse_request(run.request)
    assert (request.micro_batch_size, request.seq_len, request.precision) == (2, 16, "fp32")


def test_a_run_that_ends_early_is_recorded_with_the_steps_that_it_had(tmp_path):
    path = tmp_path / "records.jsonl"
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), steps=9, record_to=path)
    trainer(tmp_path, callback, llama()).train()
    assert [each.steps for each in read(path)] == [3]


def test_training_twice_records_twice(tmp_path):
    path = tmp_path / "records.jsonl"
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), steps=1, record_to=path)
    run = trainer(tmp_path, callback, llama())
    run.train()
    run.train()
    assert len({each.id for each in read(path)}) == 2


def test_lora_with_checkpointing_and_autocast_is_read_off_the_trainer(tmp_path):
    import peft

    adapters = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), steps=0, request_to=tmp_path / "a.json")
    run = trainer(
        tmp_path,
        callback,
        peft.get_peft_model(llama(attention="eager"), adapters),
        samples(5, 9, 12, 3),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        bf16=True,
        optim="adamw_torch",
        max_steps=1,
    )
    run.train()
    found = json.loads((tmp_path / "a.json").read_text())
    expected = {
        "precision": "amp_bf16",
        "autocast": None,
        "micro_batch_size": 1,
        "seq_len": 12,
        "gradient_accumulation_steps": 2,
        "padding": False,
        "activation_checkpointing": "full",
        "attention": "eager",
        "loss": "standard",
        "software": {"framework": "transformers", "version": "5"},
    }
    assert {name: found[name] for name in expected} == expected
    assert found["optimizer"]["implementation"] == "foreach"
    assert (found["method"]["name"], found["method"]["r"]) == ("lora", 4)
    assert callback.result.parameters.trainable == run.model.get_nb_trainable_parameters()[0]


def test_the_trainer_takes_the_norm_even_where_it_does_not_clip(tmp_path, monkeypatch):
    """So `max_grad_norm` 0 needs the memory of any other, and the document says the default."""
    import torch

    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(*args: Any, **kwargs: Any) -> Any:
        norms.append(args[1])
        return clip(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), steps=0)
    trainer(tmp_path, callback, llama(), max_grad_norm=0.0, max_steps=1).train()
    assert norms == [float("inf")]
    assert callback.result.request["loop"]["max_grad_norm"] == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"micro_batch_size": 2, "seq_len": 41, "padding": True, "packing": False}),
        (
            {"packing": True, "max_length": 32},
            {"micro_batch_size": 1, "seq_len": 64, "padding": False, "packing": True},
        ),
    ],
)
def test_trls_sft_trainer_is_read_with_its_own_defaults(settings, expected, tmp_path, said):
    import peft
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    request = tmp_path / "request.json"
    callback = MemoryPreflight(meter=FakeMeter(ROOMY), request_to=request)
    run = SFTTrainer(
        model=llama(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=3,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4"] * 5 + ["w1 " * 40] * 3}),
        processing_class=_tokenizer(),
        callbacks=[callback],
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    run.train()
    assert run.state.global_step == 3
    found = json.loads(request.read_text())
    assert {name: found[name] for name in expected} == expected
    assert (found["loss"], found["activation_checkpointing"]) == ("chunked", "full")
    assert (found["precision"], found["software"]["framework"]) == ("amp_bf16", "trl")
    counted = callback.result.parameters
    assert (counted.trainable, counted.total) == run.model.get_nb_trainable_parameters()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{each}": each + 3 for each in range(9)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("look", "usable"),
    [
        # Nothing is held yet: what is free, and the context as far as something is in use.
        ({"free": 900}, 950),
        ({"free": 990}, 1000),
        # The process's own reserve counts as its own.
        ({"free": 500, "reserved": 300}, 850),
        # A context that is known is taken as it is; what others use is not this process's.
        ({"free": 500, "reserved": 300, "context": 20}, 820),
        # A limit holds for tensors, not for the context.
        ({"free": 500, "reserved": 300, "context": 20, "limit": 400}, 420),
    ],
)
def test_what_a_process_can_hold_is_what_is_free_and_what_it_holds(look, usable):
    given = Look(**{"name": "x", "total": 1000, "allocated": 0, "reserved": 0, **look})
    assert capacity(given, context=50)[0] == usable


def test_tensors_of_nobody_are_counted_in_whole_blocks():
    import torch

    known = [torch.zeros(128), torch.zeros(128), torch.zeros(8, device="meta")]
    known.append(known[0].view(2, 64))
    look = Look("x", total=9000, free=0, allocated=5000, reserved=6000)
    assert unknown_tensors(look, known, torch.device("cpu")) == 5000 - 2 * 512


def test_what_else_the_process_holds_is_not_the_runs(tmp_path, said):
    model = llama()
    held = FakeMeter(ROOMY, allocated=2**30, reserved=2**30)
    callback = MemoryPreflight(meter=held, steps=0, request_to=tmp_path / "a.json")
    trainer(tmp_path, callback, model).train()
    hardware = json.loads((tmp_path / "a.json").read_text())["hardware"]
    largest = sum(-(-each.nbytes // 512) * 512 for each in model.parameters())
    assert 2**30 - 2 * largest < hardware["reserved_by_others_bytes"] <= 2**30 - largest
    assert "belong to neither model nor optimizer" in said("INFO")[0]


@pytest.fixture
def card(monkeypatch):
    """Let torch.cuda answer as a card of 1000 bytes does, through functions of the same names."""
    import torch

    answers = {
        "mem_get_info": lambda device: (300, 1000),
        "memory_reserved": lambda device: 500,
        "memory_allocated": lambda device: 400,
        "max_memory_allocated": lambda device: 450,
        "max_memory_reserved": lambda device: 550,
        "memory_stats": lambda device: {"requested_bytes.all.peak": 440},
        "get_device_name": lambda device: "NVIDIA GeForce RTX 4090",
        "get_per_process_memory_fraction": lambda device: 0.75,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(
            name="NVIDIA GeForce RTX 4090", major=8, minor=9, multi_processor_count=128, uuid="x"
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return "cuda:0"


def test_the_meter_of_cuda_reads_torchs_counters(card):
    meter = CudaMeter(card)
    assert meter.origin == "measured"
    look = meter.look()
    assert look[:5] == ("NVIDIA GeForce RTX 4090", 1000, 300, 400, 500)
    assert look.limit == 750
    peak = meter.peak()
    assert (peak.allocated_bytes, peak.requested_bytes, peak.reserved_bytes) == (450, 440, 550)
    meter.reset()
    meter.synchronize()
    found = meter.environment()
    assert (found.gpu_id, found.compute_capability, found.total_bytes) == ("rtx-4090", "8.9", 1000)
    assert "torch" in found.versions


@pytest.mark.parametrize(
    ("computing", "drawing", "context"), [(1, 0, 200), (2, 0, None), (1, 1, None), (0, 0, None)]
)
def test_the_context_is_known_where_no_other_process_is_on_the_device(
    computing, drawing, context, card, monkeypatch
):
    import pynvml

    asked = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", asked.append)
    for kind, count in (("Compute", computing), ("Graphics", drawing)):
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        monkeypatch.setattr(pynvml, name, lambda handle, count=count: [object()] * count)
    assert CudaMeter(card).look().context == context
    assert asked == [b"GPU-x"]


@pytest.mark.gpu
def test_a_step_on_a_device_is_recorded_as_measured(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = tmp_path / "records.jsonl"
    callback = MemoryPreflight(record_to=path)
    trainer(tmp_path, callback, llama(), use_cpu=False).train()
    (run,) = read(path)
    assert (run.origin, run.steps) == ("measured", 3)
    assert callback.result.capacity.usable_bytes <= run.environment.total_bytes


@pytest.mark.parametrize(
    "settings", [{"on_misfit": "raise"}, {"steps": -1}, {"seq_len": 0}], ids=str
)
def test_wrong_settings_are_refused_when_the_callback_is_made(settings):
    with pytest.raises(InvalidRequestError):
        MemoryPreflight(**settings)


def test_only_the_first_process_speaks(said):
    callback = MemoryPreflight(meter=FakeMeter(ROOMY))
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None)
    assert said("INFO") == said("WARNING") == []


def test_the_example_of_the_page_is_the_file_in_examples_and_says_what_the_page_shows(
    tmp_path, said, monkeypatch
):
    import torch

    example = (ROOT / "examples" / "preflight_callback.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "callback.md").read_text(encoding="utf-8")
    assert re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) == [example]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/callback.md", "exec"), {})
    assert said("INFO")[0].startswith("memory: ")
    if not torch.cuda.is_available():
        shown = " ".join(page.split())
        # The rest of the sentence is the engine's, and moves with the calibration.
        assert said("INFO")[0].startswith("memory: Needs ")
        assert "INFO:profiler.callback:memory: Needs " in shown
        assert f"WARNING:profiler.callback:{said('WARNING')[0]}" in shown
