"""The GPU in this machine is read from its driver, and a machine without one is told what to do."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from estimator import nvml
from estimator.catalog import find_gpu
from estimator.errors import NoDriverError
from estimator.units import MiB

# One line as nvidia-smi prints it on an idle card; sizes in MiB.
SMI_4090 = "NVIDIA GeForce RTX 4090, 24564, 24083, 18, 550.54.15\n"


class FakeNvmlError(Exception):
    """Stands for pynvml.NVMLError."""


def fake_pynvml(*, version_2=True, cards=1, starts=True):
    """A driver with RTX 4090 cards; version 1 of its memory figures counts the reserve as used."""
    log = []

    def start():
        if not starts:
            raise FakeNvmlError("library not found")
        log.append("start")

    def handle(index):
        if index >= cards:
            raise FakeNvmlError("invalid argument")
        return index

    def memory(handle, version=1):
        if version == 2 and not version_2:
            raise FakeNvmlError("function not found")
        used = 18 if version == 2 else 481
        return SimpleNamespace(total=24564 * MiB, free=24083 * MiB, used=used * MiB)

    return SimpleNamespace(
        NVMLError=FakeNvmlError,
        nvmlMemory_v2=2,
        nvmlInit=start,
        nvmlShutdown=lambda: log.append("stop"),
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetName=lambda handle: b"NVIDIA GeForce RTX 4090",
        nvmlSystemGetDriverVersion=lambda: "550.54.15",
        log=log,
    )


@pytest.fixture
def no_nvidia_smi(monkeypatch):
    monkeypatch.setattr(nvml.shutil, "which", lambda name: None)


def with_nvidia_smi(monkeypatch, answer="", error=None):
    """Put an nvidia-smi on PATH; returns the command lines it was given."""
    commands = []

    def run(command, **options):
        commands.append((command, options))
        if error is not None:
            raise error
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(nvml.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(nvml.subprocess, "run", run)
    return commands


def test_nvml_gives_total_free_and_used_memory(monkeypatch, no_nvidia_smi):
    pynvml = fake_pynvml()
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    gpu = nvml.probe()
    assert gpu == nvml.LiveGpu(
        "NVIDIA GeForce RTX 4090", 24564 * MiB, 24083 * MiB, 18 * MiB, "550.54.15"
    )
    assert pynvml.log == ["start", "stop"]


def test_the_driver_s_name_is_found_in_the_catalogue_which_offers_less(monkeypatch, no_nvidia_smi):
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml())
    gpu = nvml.probe()
    known = find_gpu(gpu.name)
    assert known.key == "rtx-4090"
    assert known.usable_bytes is not None
    assert known.usable_bytes < gpu.total_bytes


def test_an_old_driver_answers_in_version_1(monkeypatch, no_nvidia_smi):
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(version_2=False))
    assert nvml.probe().used_by_others_bytes == 481 * MiB


@pytest.mark.parametrize("pynvml", [None, fake_pynvml(starts=False)])
def test_nvidia_smi_is_asked_where_nvml_is_missing(monkeypatch, pynvml):
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    commands = with_nvidia_smi(monkeypatch, SMI_4090)
    gpu = nvml.probe(1)
    assert (gpu.total_bytes, gpu.free_bytes) == (24564 * MiB, 24083 * MiB)
    assert (gpu.used_by_others_bytes, gpu.driver) == (18 * MiB, "550.54.15")
    ((command, options),) = commands
    assert command[:2] == ["/usr/bin/nvidia-smi", "--id=1"]
    assert not options.get("shell")
    assert options["timeout"] == nvml.TIMEOUT_SECONDS


def test_a_machine_without_a_driver_is_told_to_name_a_card(monkeypatch, no_nvidia_smi):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoDriverError, match="--gpu NAME") as refusal:
        nvml.probe()
    assert "\n" not in str(refusal.value)


def test_an_index_without_a_card_is_refused(monkeypatch, no_nvidia_smi):
    pynvml = fake_pynvml()
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    with pytest.raises(NoDriverError, match="GPU 3"):
        nvml.probe(3)
    assert pynvml.log == ["start", "stop"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("NVIDIA GB10, [N/A], [N/A], [N/A], 580.95.05\n", None),
        ("", None),
        ("No devices were found\n", None),
        ("", subprocess.TimeoutExpired("nvidia-smi", 10)),
        ("", subprocess.CalledProcessError(9, "nvidia-smi")),
        ("", PermissionError("not executable")),
    ],
)
def test_an_nvidia_smi_that_gives_no_figures_counts_as_no_driver(monkeypatch, answer, error):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with_nvidia_smi(monkeypatch, answer, error)
    with pytest.raises(NoDriverError):
        nvml.probe()
