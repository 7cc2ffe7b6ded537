"""The measurement: the workload on tensors with values, the simulated device, the module."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from estimator.errors import MissingDependencyError, UnsupportedCombinationError
from estimator.record import Run, read
from estimator.request import EstimateRequest
from estimator.service import requested_gpu
from profiler import engine, measure_cli
from profiler.device import Cuda, Simulated
from profiler.measure import main
from profiler.measurement import Options, hold_lock, measure
from profiler.probes import PROBES, measured
from tests.profiler.host import Host
from tests.profiler.recipes import TINY, request

ROOT = Path(__file__).resolve().parents[2]
# Wide enough for the blocks of packed weights.
WIDE = {**TINY, "hidden_size": 128, "intermediate_size": 256}
LORA = {"name": "lora", "r": 4}


def on_host(steps: int = 3, host: Host | None = None, **fields: Any) -> Run:
    asked = request(WIDE, **{"seq_len": 32, **fields})
    return measure(asked, WIDE, host or Host(), Options(steps=steps))


def simulated(limit: int | None = None, **fields: Any) -> Run:
    asked = request(TINY, **fields)
    return measure(asked, TINY, Simulated(requested_gpu(asked)), Options(limit_bytes=limit))


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "fp32"},
        {"precision": "master_bf16"},
        {"precision": "amp_bf16", "gradient_accumulation_steps": 3},
        {"precision": "amp_fp16", "activation_checkpointing": "full"},
        {"activation_checkpointing": "selective_attention"},
        {"method": LORA, "micro_batch_size": 2, "padding": True},
        {"method": LORA, "micro_batch_size": 2, "packing": True},
        {"method": {**LORA, "use_dora": True}, "quantization": {"name": "nf4"}},
        {"method": LORA, "quantization": {"name": "fp4", "double_quant": False}},
        {"method": LORA, "quantization": "int8"},
        {"method": LORA, "quantization": "torchao_int8"},
        {"method": "mezo"},
        {"method": "badam"},
        {"method": "prompt_tuning"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "ademamix"},
        {"optimizer": "apollo_adamw"},
        {"optimizer": "grokadamw"},
        {"optimizer": "sophia"},
        {"optimizer": "lomo"},
        {"optimizer": {"name": "adamw", "in_backward": True}},
        {"loop": {"ema": "cuda", "neftune_noise_alpha": 5.0, "keep_outputs": True}},
        {"loss": "chunked"},
        {"attention": "sdpa_math"},
    ],
    ids=str,
)
def test_a_recipe_trains_on_tensors_that_have_values(fields: dict[str, Any]) -> None:
    run = on_host(**fields)
    assert (run.outcome, run.steps, len(run.step_seconds)) == ("ok", 3, 3)
    assert {"forward", "loss forward", "optimizer step"} <= {each.phase for each in run.phases}
    assert run.peak.allocated_bytes is not None
    assert all(each.peak.allocated_bytes <= run.peak.allocated_bytes for each in run.phases)


def test_real_tensors_take_what_the_dry_run_says() -> None:
    # With fp32 CPU and CUDA run the same operators, but for attention and workspaces.
    fields: dict[str, Any] = {"precision": "fp32", "attention": "eager", "optimizer": "adam"}
    asked = request(WIDE, seq_len=32, **fields)
    traced = {
        moment.moment: sum(size for name, size in moment.components.items() if name != "runtime")
        for moment in engine.dry_run(asked, WIDE).timeline
    }
    counted = {each.phase: each.peak.allocated_bytes for each in on_host(**fields).phases}
    workspaces = 2 * 8_519_680  # torch's cuBLAS workspaces below Hopper: 2 x 4096 KiB + 8 x 16 KiB
    for phase in ("loss forward", "optimizer step"):
        assert counted[phase] == pytest.approx(traced[phase] - workspaces, rel=0.02)


def test_random_token_ids_are_within_the_vocabulary_and_differ() -> None:
    host = Host()
    on_host(host=host)
    ids = torch.cat([each.flatten() for each in host.ids])
    assert int(ids.min()) >= 0
    assert int(ids.max()) < WIDE["vocab_size"]
    assert len(ids.unique()) > 20


def test_every_micro_batch_of_a_real_step_is_run() -> None:
    host = Host()
    on_host(host=host, gradient_accumulation_steps=5)
    assert len(host.ids) == 3 * 5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_packed_weights_are_of_the_librarys_own_class_and_of_usual_size() -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Int8Params, Params4bit

    from profiler import placement, workload

    for quantization, kind in (("nf4", Params4bit), ("int8", Int8Params)):
        asked = request(WIDE, method=LORA, quantization=quantization)
        model = workload.meta_model(asked, workload.model_config(WIDE), fake=False)
        placement.place(model, "cpu", fake=False)
        layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
        assert type(layer.weight) is kind
        if kind is Params4bit:
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            values = layer.weight * layer.state.SCB[:, None] / 127
        assert 0.005 < float(values.float().std()) < 0.05


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"kernels": ["unsloth"], "method": "lora"}, UnsupportedCombinationError, "kernels="),
        ({"method": "loreft"}, UnsupportedCombinationError, "method='loreft'"),
        ({"optimizer": "lowmem_adafactor"}, UnsupportedCombinationError, "optimizer="),
        ({"precision": "megatron_bf16"}, UnsupportedCombinationError, "one buffer"),
        ({"loop": {"ema": "cpu"}}, UnsupportedCombinationError, "loop.ema"),
        ({"method": "lora", "quantization": "hqq"}, UnsupportedCombinationError, "'hqq'"),
        ({"attention": "flash_attention_2"}, MissingDependencyError, "'flash_attn'"),
    ],
    ids=str,
)
def test_what_runs_on_a_stand_in_only_is_not_measured(
    fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        on_host(**fields)


def test_a_run_that_runs_out_of_memory_is_recorded_with_the_peaks_so_far() -> None:
    whole = on_host()
    assert whole.peak.allocated_bytes is not None
    limit = whole.peak.allocated_bytes - 1
    asked = request(WIDE, seq_len=32)
    run = measure(asked, WIDE, Host(), Options(limit_bytes=limit))
    assert (run.outcome, run.reason, run.limit_bytes) == ("out_of_memory", "no room", limit)
    assert run.steps < whole.steps
    assert run.peak.allocated_bytes is not None
    assert run.peak.allocated_bytes > 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "amp_bf16", "activation_checkpointing": "full"},
        {"method": "lora", "hardware": {"gpu": "h100-80gb-sxm5"}},
        {"gradient_accumulation_steps": 2, "micro_batch_size": 2, "optimizer": "sgd"},
    ],
    ids=str,
)
def test_the_simulated_device_says_what_the_dry_run_says(fields: dict[str, Any]) -> None:
    run = simulated(**fields)
    traced = engine.dry_run(request(TINY, **fields), TINY)
    assert run.origin == "simulated"
    assert run.peak.allocated_bytes == traced.peak.allocated_bytes.expected
    assert run.peak.reserved_bytes == traced.peak.reserved_bytes.expected
    assert run.peak.device_used_bytes == traced.peak.device_used_bytes.expected
    phases = {each.phase: each.peak.allocated_bytes for each in run.phases}
    moments = {each.moment: each.bytes for each in traced.timeline}
    assert list(phases) == list(moments)
    # A phase that only frees counts for torch what was there when it began.
    assert all(phases[name] >= size for name, size in moments.items())
    assert max(phases.values()) == max(moments.values())


def test_the_simulated_device_runs_out_of_memory_below_the_need_and_not_above() -> None:
    whole = simulated()
    assert whole.peak.reserved_bytes is not None
    assert whole.peak.requested_bytes is not None
    assert simulated(whole.peak.reserved_bytes).outcome == "ok"
    short = simulated(whole.peak.requested_bytes - 1)
    assert short.outcome == "out_of_memory"
    assert short.reason is not None
    assert short.reason.startswith("out of memory")
    assert short.limit_bytes == whole.peak.requested_bytes - 1


def test_the_record_holds_the_request_that_was_run() -> None:
    asked = request(TINY, method="lora")
    run = measure(asked, TINY, Simulated(None), Options(id="one", group="g"))
    assert run.request == asked.to_dict()
    assert (run.id, run.group) == ("one", "g")
    assert run.environment.gpu == "simulated GPU"
    assert run.environment.versions["torch"] == torch.__version__
    assert run.environment.versions["transformers"]


BLOCKED = ("msgspec", "pydantic", "fastapi", "click", "rich", "starlette", "plotly", "yaml")


def _module(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in BLOCKED)
    # The last one is transformers' own, which may have it; nothing of ours may need it.
    command = (
        f"import sys; {blocked}from profiler.measure import main; del sys.modules['yaml']; "
        "sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_module_needs_nothing_but_the_core_and_the_stack(tmp_path: Path) -> None:
    document = json.dumps({"model": {"config": TINY}, "seq_len": 64})
    out, lock = tmp_path / "records" / "out.jsonl", tmp_path / "lock"
    done = _module(
        "-", "--device", "simulated", "--gpu", "rtx-4090", "--append", str(out),
        "--group", "trial", "--id", "first", "--lock", str(lock), stdin=document,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (run,) = read(out)
    assert isinstance(run, Run)
    assert (run.id, run.group, run.outcome) == ("first", "trial", "ok")
    assert run.environment.gpu_id == run.request["hardware"]["gpu"] == "rtx-4090"


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"model": {"config": TINY}, "seq_len": 64}))
    return str(path)


def test_without_append_the_record_is_one_line_of_standard_output(
    document: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main([document, "--device", "simulated"]) == 0
    out = capfdbinary.readouterr().out
    assert out.count(b"\n") == 1
    assert json.loads(out)["record"] == "run"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--device", "simulated"], 2, "name a request document"),
        (["FILE", "--probe", "context"], 2, "and not both"),
        (["FILE", "--steps", "2"], 2, "fewer than 3"),
        (["FILE", "--memory-limit", "none"], 2, "--memory-limit"),
        (["FILE", "--gpu", "rtx-4090"], 2, "--device simulated"),
        (["FILE", "--device", "simulated", "--gpu", "rtx-1"], 2, "unknown GPU"),
        (["FILE", "--device", "simulated", "--snapshot", "x"], 2, "--snapshot"),
        (["no-such-file.json"], 2, "cannot read"),
        (["FILE", "--nonsense"], 2, "--nonsense"),
        (["FILE"], 3, "no CUDA device"),
        (["--probe", "context", "--arguments", "[1]"], 2, "JSON object"),
        (["--probe", "context", "--arguments", "{"], 2, "not JSON"),
        (["--probe", "nothing", "--device", "simulated"], 2, "unknown probe"),
        (["--probe", "context", "--arguments", '{"a": 1}'], 2, "no argument 'a'"),
        (["--probe", "context", "--arguments", '{"seq_len": "1"}'], 2, "'seq_len'"),
        (["--probe", "context"], 3, "no CUDA device"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_one_line_and_a_code(
    arguments: list[str], code: int, words: str, document: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if code == 3 and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    given = [document if each == "FILE" else each for each in arguments]
    try:
        got = main(given)
    except SystemExit as stop:
        got = stop.code
    captured = capsys.readouterr()
    assert got == code
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_a_recipe_that_fails_on_the_device_is_refused_with_its_reason(document: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match="pin"):
        on_host(activation_checkpointing="offload")


class _Memory:
    """The part of torch.cuda that a measurement asks, with a device of 1000 bytes behind it."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self) -> None:
        self.called: list[Any] = []
        self.free = 700
        self.stats = {
            "allocated_bytes.all.peak": 11,
            "requested_bytes.all.peak": 10,
            "reserved_bytes.all.peak": 20,
            "allocated_bytes.all.current": 5,
        }
        self.memory = self

    def is_available(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name not in ("init", "synchronize", "empty_cache", "reset_peak_memory_stats",
                        "set_per_process_memory_fraction", "_record_memory_history"):  # fmt: skip
            raise AttributeError(name)
        return lambda *args, **kwargs: self.called.append((name, *args, *kwargs.items()))

    def mem_get_info(self) -> tuple[int, int]:
        return self.free, 1000

    def memory_stats(self) -> dict[str, int]:
        return self.stats

    def _snapshot(self) -> dict[str, Any]:
        return {"segments": [], "device_traces": [[]]}

    def get_device_name(self) -> str:
        return "NVIDIA GeForce RTX 4090"

    def get_device_capability(self) -> tuple[int, int]:
        return 8, 9

    def get_device_properties(self, _: int) -> Any:
        return type("Properties", (), {"multi_processor_count": 128})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Memory:
    from estimator.nvml import LiveGpu
    from profiler import device

    memory = _Memory()
    monkeypatch.setattr(Cuda, "_cuda", memory)
    monkeypatch.setattr(Cuda, "name", "cpu")
    live = LiveGpu("NVIDIA GeForce RTX 4090", 1000, 900, 100, "580.1")  # type: ignore[arg-type]
    monkeypatch.setattr(device, "probe", lambda _: live)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return memory


def test_the_gpus_meters_are_torchs_and_the_drivers(cuda: _Memory, tmp_path: Path) -> None:
    gpu = Cuda()
    gpu.check()
    gpu.open(400)
    assert gpu.idle_bytes == 1000 - 700 - 100
    cuda.free = 300
    meters = gpu.meters()
    assert (meters.allocated_bytes, meters.requested_bytes, meters.reserved_bytes) == (11, 10, 20)
    assert meters.device_used_bytes == 1000 - 300 - 100
    names = [name for name, *_ in cuda.called]
    assert names.index("empty_cache") < names.index("reset_peak_memory_stats")
    (fraction,) = [each[1] for each in cuda.called if each[0] == "set_per_process_memory_fraction"]
    assert int(fraction * 1000) == 400
    gpu.record_history()
    assert ("_record_memory_history", ("context", None)) in cuda.called
    gpu.write_history(tmp_path / "s.pickle.gz")
    with gzip.open(tmp_path / "s.pickle.gz") as file:
        assert pickle.load(file) == cuda._snapshot()
    assert [path.name for path in tmp_path.iterdir()] == ["s.pickle.gz"]
    found = gpu.environment()
    assert (found.gpu, found.gpu_id) == ("NVIDIA GeForce RTX 4090", "rtx-4090")
    assert (found.compute_capability, found.multiprocessors) == ("8.9", 128)
    assert (found.total_bytes, found.driver) == (1000, "580.1")


def test_without_an_answer_of_the_driver_nothing_is_said_of_device_memory(
    cuda: _Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f1a")
    gpu = Cuda()
    gpu.open(None)
    assert gpu.idle_bytes is None
    assert gpu.meters().device_used_bytes is None
    assert gpu.meters().allocated_bytes == 11


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("No available kernel. Aborting execution."), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_only_what_says_so_is_taken_for_running_out_of_memory(
    error: Exception, ran_out: bool
) -> None:
    assert Cuda().ran_out(error) is ran_out


def test_a_gpu_drives_the_very_same_workload(cuda: _Memory) -> None:
    run = measure(request(WIDE, seq_len=32), WIDE, Cuda(), Options())
    assert (run.origin, run.outcome, run.steps) == ("measured", "ok", 3)
    assert run.environment.gpu_id == "rtx-4090"
    assert ("reset_peak_memory_stats",) in cuda.called
    assert [each.phase for each in run.phases] == [
        "forward", "loss forward", "backward", "gradient clipping", "optimizer step",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "values"),
    [
        # 2 x 4096 KiB + 8 x 16 KiB, and 32 MiB on Hopper: CUDABlas.cpp, parseChosenWorkspaceSize.
        ("cublas_workspace", {}, {"first_forward": 8_519_680, "first_backward": 8_519_680}),
        # Six tables of int64 and a row of fp32 for each token, above 3072 of them.
        ("embedding_backward", {"tokens": 3072}, {"backward": 262_144_000}),
        ("embedding_backward", {"tokens": 3073}, {"backward": 262_144_000 + 50_499_584}),
        # One token: a fused kernel, and nothing but 4096 numbers of two bytes.
        ("bnb_4bit_threshold", {"tokens": 1}, {"forward": 4096 * 2}),
        ("attention_backward", {"backend": "math", "heads": 2, "kv_heads": 2, "seq_len": 256}, {}),
        ("attention_backward", {"heads": 8, "kv_heads": 2, "seq_len": 256}, {}),
        ("attention_backward", {"backend": "efficient", "seq_len": 256}, {}),
        ("context", {}, {}),
    ],
    ids=str,
)
def test_a_probe_of_the_simulated_device_answers_as_the_dry_run_does(
    name: str, arguments: dict[str, Any], values: dict[str, int]
) -> None:
    found = measured(name, arguments, Simulated(None), Options(id="x"))
    assert (found.outcome, found.reason, found.origin) == ("ok", None, "simulated")
    assert found.values
    for key, value in values.items():
        assert found.values[key] == pytest.approx(value, rel=0.001), found.values
    assert set(arguments.items()) <= set(found.arguments.items())


def test_every_probe_is_tried_above() -> None:
    assert set(PROBES) == {
        "context", "cublas_workspace", "attention_backward", "embedding_backward",
        "bnb_4bit_threshold",
    }  # fmt: skip


def test_above_the_threshold_a_4bit_weight_is_unpacked_whole() -> None:
    one, other = (
        measured("bnb_4bit_threshold", {"tokens": tokens}, Simulated(None), Options()).values
        for tokens in (1, 1537)
    )
    assert one["forward"] == one["output"]
    assert other["forward"] - other["output"] >= 4096 * 4096 * 2


def test_what_a_simulated_device_cannot_answer_is_recorded_as_an_error() -> None:
    found = measured("attention_backward", {"backend": "cudnn"}, Simulated(None), Options())
    assert (found.outcome, found.values) == ("error", {})
    assert found.reason == "cuDNN's attention is not simulated"


def test_a_context_that_was_there_before_spoils_the_reading_of_others(
    cuda: _Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _: True, raising=False)
    gpu = Cuda()
    gpu.open(None)
    assert gpu.idle_bytes is None


def test_the_command_shows_the_meters_beside_the_prediction(document: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--request", document, "--device", "simulated", "--gpu", "rtx-4090"]
    outcome = CliRunner().invoke(measure_cli.measure, [*arguments, "--append", str(out)])
    assert outcome.exception is None, outcome.output
    lines = outcome.stdout.splitlines()
    assert lines[0] == "simulated GeForce RTX 4090, simulated: 2 steps, ok"
    shown = {line[:22].strip(): line.split()[-1] for line in lines if line.endswith("%")}
    assert {"allocated", "reserved", "device-used", "backward", "optimizer step"} <= set(shown)
    # The analytic engine and the dry run agree within 1 % here as everywhere.
    assert abs(float(shown["allocated"].rstrip("%"))) < 1
    (run,) = read(out)
    assert run.origin == "simulated"


def test_the_command_prints_the_record_on_request(document: str) -> None:
    arguments = ["--request", document, "--device", "simulated", "--json", "--id", "mine"]
    outcome = CliRunner().invoke(measure_cli.measure, arguments)
    assert outcome.exception is None, outcome.output
    record = json.loads(outcome.stdout)
    assert (record["record"], record["id"], record["origin"]) == ("run", "mine", "simulated")


def test_a_run_that_ran_out_says_so_and_is_compared_as_far_as_it_went() -> None:
    text = measure_cli.summary(simulated(10_000_000), None)
    assert "0 steps, out of memory" in text.splitlines()[0]
    assert text.splitlines()[1].startswith("out of memory: tried to allocate")


def test_the_lock_is_taken_between_the_preparation_and_the_device(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    states = []

    def is_free() -> bool:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    class Watching(Host):
        @contextlib.contextmanager
        def prepared(self, request: EstimateRequest, config: dict[str, Any]) -> Iterator[Any]:
            with super().prepared(request, config) as train:
                states.append(("prepared", is_free()))
                yield train

        def open(self, limit_bytes: int | None) -> None:
            states.append(("opened", is_free()))

    measure(request(WIDE, seq_len=32), WIDE, Watching(), Options(lock=lock))
    assert states == [("prepared", True), ("opened", False)]


def test_the_lock_is_held_until_the_process_ends(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    hold_lock(lock)
    with lock.open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_refusal_is_the_last_line_of_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"model": {"config": {"model_type": "baichuan"}}}))
    done = subprocess.run(
        [sys.executable, "-m", "profiler.measure", str(path), "--device", "simulated"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith("profiler.measure: transformers ")
