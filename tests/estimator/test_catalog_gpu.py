"""A GPU is found by what people and drivers call it, with the memory it really offers."""

import pytest

from estimator.catalog import find_gpu, gpus
from estimator.errors import UnknownGpuError
from estimator.units import GiB, MiB


def test_the_catalogue_holds_every_gpu_of_the_reference():
    vendors = [gpu.vendor for gpu in gpus()]
    counts = {vendor: vendors.count(vendor) for vendor in set(vendors)}
    assert counts == {"NVIDIA": 102, "AMD": 15, "Intel": 7, "Apple": 18}


def test_every_key_name_and_alias_finds_its_own_gpu():
    for gpu in gpus():
        for name in (gpu.key, gpu.name, *gpu.aliases, gpu.name.upper()):
            assert find_gpu(name).key == gpu.key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("nvidia geforce rtx 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("h100 pcie", "h100-80gb-pcie"),
        ("a100-80gb", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("h200", "h200"),
        ("t4", "t4"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
        ("RTX A6000", "rtx-a6000"),
        ("4060 Ti 16 GB", "rtx-4060-ti-16gb"),
        ("MI300X", "mi300x"),
        ("m3 max", "apple-m3-max"),
        ("DGX Spark", "gb10"),
    ],
)
def test_a_gpu_is_found_by_the_names_people_and_drivers_use(name, key):
    assert find_gpu(name).key == key


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("A100", ["a100-40gb", "a100-40gb-pcie", "a100-80gb", "a100-80gb-pcie"]),
        ("h100", ["h100-80gb-sxm", "h100-80gb-pcie", "h100-nvl"]),
        ("v100", ["v100-16gb", "v100-32gb"]),
    ],
)
def test_a_name_that_leaves_a_choice_is_refused_with_the_candidates(name, candidates):
    with pytest.raises(UnknownGpuError) as refusal:
        find_gpu(name)
    assert all(candidate in str(refusal.value) for candidate in candidates)


@pytest.mark.parametrize("name", ["rtx 4091", "voodoo2", "", "rtx", "--", "x" * 100])
def test_an_unknown_gpu_says_what_to_do(name):
    with pytest.raises(UnknownGpuError, match="estimate gpus"):
        find_gpu(name)


# Printed by torch in users' error messages [GiB]: mistralai/mistral-finetune#69,
# MIC-DKFZ/MedNeXt#35, hiyouga/LlamaFactory#7628, NVIDIA-NeMo/Automodel#1948.
@pytest.mark.parametrize(
    ("key", "printed_gib"),
    [("a10g", 21.99), ("rtx-4090", 23.64), ("a100-80gb", 79.15), ("h100-80gb-sxm", 79.11)],
)
def test_usable_memory_is_never_more_than_torch_printed_to_users(key, printed_gib):
    usable = find_gpu(key).usable_bytes
    assert usable is not None
    assert usable <= printed_gib * GiB
    assert usable >= 0.99 * printed_gib * GiB


# nvidia-smi totals [MiB] of public outputs, which torch's total_memory never exceeds.
@pytest.mark.parametrize(
    ("key", "nvidia_smi_mib"),
    [
        ("rtx-3090", 24576),
        ("rtx-4090", 24564),
        ("rtx-5090", 32607),
        ("rtx-a6000", 49140),
        ("t4", 15360),
        ("a40", 46068),
        ("h100-80gb-pcie", 81559),
        ("h200", 143771),
        ("b200", 183359),
    ],
)
def test_usable_memory_is_less_than_nvidia_smi_shows(key, nvidia_smi_mib):
    usable = find_gpu(key).usable_bytes
    assert usable is not None
    assert usable < nvidia_smi_mib * MiB


def test_usable_memory_is_below_the_number_on_the_box_and_says_why():
    for gpu in gpus():
        assert gpu.usable_source
        assert (gpu.usable_bytes is None) == (gpu.usable_basis is None)
        assert gpu.usable_bytes is None or gpu.usable_bytes < gpu.nominal_bytes


def test_memory_shared_with_the_cpu_has_no_usable_size():
    shared = [gpu for gpu in gpus() if gpu.segment == "unified"]
    assert len(shared) == 20
    assert all(gpu.usable_bytes is None for gpu in shared)


def test_bf16_and_flash_attention_begin_with_compute_capability_8():
    # flash-attention README: Ampere, Ada, Hopper; NVIDIA: bf16 from Ampere on.
    for gpu in gpus():
        if gpu.vendor == "NVIDIA":
            modern = float(gpu.compute_capability) >= 8.0
            assert gpu.bf16_supported is modern
            assert gpu.flash_attention_2_supported is modern
