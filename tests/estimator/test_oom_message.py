"""Real out-of-memory messages, in the wordings of several versions; numbers as the issues print."""

import pytest

from estimator.errors import InvalidRequestError
from estimator.oom_message import MAX_MESSAGE_CHARACTERS, parse_message
from estimator.units import GiB, MiB

# Each with the issue that it was read in, and what it says [bytes].
MESSAGES = {
    # pytorch/pytorch#16417: torch 1.0, "cached" is what is held and not used
    "torch 1.0": (
        "CUDA out of memory. Tried to allocate 12.50 MiB (GPU 0; 10.92 GiB total capacity; 8.57 "
        "MiB already allocated; 9.28 GiB free; 4.68 MiB cached)",
        {
            "device": 0,
            "tried_bytes": 12.5 * MiB,
            "total_bytes": 10.92 * GiB,
            "allocated_bytes": 8.57 * MiB,
            "free_bytes": 9.28 * GiB,
            "reserved_bytes": (8.57 + 4.68) * MiB,
        },
    ),
    # JDAI-CV/centerX#51
    "torch 1.4": (
        "RuntimeError: CUDA out of memory. Tried to allocate 130.00 MiB (GPU 1; 7.80 GiB total "
        "capacity; 5.91 GiB already allocated; 33.56 MiB free; 6.09 GiB reserved in total by "
        "PyTorch)",
        {
            "device": 1,
            "tried_bytes": 130 * MiB,
            "allocated_bytes": 5.91 * GiB,
            "reserved_bytes": 6.09 * GiB,
            "free_bytes": 33.56 * MiB,
        },
    ),
    # modelscope/ms-swift#411
    "torch 1.11": (
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB (GPU 0; "
        "79.15 GiB total capacity; 76.61 GiB already allocated; 112.38 MiB free; 77.55 GiB "
        "reserved in total by PyTorch) If reserved memory is >> allocated memory try setting",
        {"tried_bytes": 112 * MiB, "allocated_bytes": 76.61 * GiB, "total_bytes": 79.15 * GiB},
    ),
    # zjunlp/EasyEdit#563: "capacty" is torch's spelling
    "torch 2.1": (
        "CUDA out of memory. Tried to allocate 355.43 GiB. GPU 0 has a total capacty of 79.32 GiB "
        "of which 18.06 GiB is free. Including non-PyTorch memory, this process has 61.25 GiB "
        "memory in use. Of the allocated memory 52.51 GiB is allocated by PyTorch, and 8.25 GiB is "
        "reserved by PyTorch but unallocated.",
        {
            "tried_bytes": 355.43 * GiB,
            "total_bytes": 79.32 * GiB,
            "free_bytes": 18.06 * GiB,
            "process_bytes": 61.25 * GiB,
            "allocated_bytes": 52.51 * GiB,
            "reserved_bytes": (52.51 + 8.25) * GiB,
            "others_bytes": None,
        },
    ),
    # THUDM/slime#1951: another process is named, and this one
    "torch 2.2, others": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 29.39 GiB. GPU 0 has a "
        "total capacity of 139.81 GiB of which 19.41 GiB is free. Process 1990324 has 3.23 GiB "
        "memory in use. Including non-PyTorch memory, this process has 117.07 GiB memory in use. "
        "Of the allocated memory 92.06 GiB is allocated by PyTorch, and 20.79 GiB is reserved by "
        "PyTorch but unallocated.",
        {"process_bytes": 117.07 * GiB, "others_bytes": 3.23 * GiB},
    ),
    # vllm-project/vllm#15039: in a container this process is one of the numbers; CUDA graphs
    "torch 2.5, in a container": (
        "CUDA out of memory. Tried to allocate 128.00 MiB. GPU 2 has a total capacity of 79.33 GiB "
        "of which 16.00 MiB is free. Process 37008 has 79.29 GiB memory in use. Of the allocated "
        "memory 69.59 GiB is allocated by PyTorch, with 46.00 MiB allocated in private pools "
        "(e.g., CUDA Graphs), and 118.90 MiB is reserved by PyTorch but unallocated.",
        {
            "device": 2,
            "process_bytes": 79.29 * GiB,
            "others_bytes": None,
            "graph_bytes": 46 * MiB,
            "reserved_bytes": 69.59 * GiB + 118.90 * MiB,
        },
    ),
    # pytorch/torchtitan's fork in a public log: torch 2.9 leaves a space out
    "torch 2.9": (
        "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 3 has a total capacity of 22.11 GiB "
        "of which19.38 MiB is free. Including non-PyTorch memory, this process has 22.09 GiB "
        "memory in use. Of the allocated memory 21.74 GiB is allocated by PyTorch, and 13.75 MiB "
        "is reserved by PyTorch but unallocated.",
        {"free_bytes": 19.38 * MiB, "process_bytes": 22.09 * GiB},
    ),
    # linkedin/Liger-Kernel#47: under WSL the driver's number for the process is none
    "WSL": (
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a "
        "total capacity of 8.00 GiB of which 0 bytes is free. Including non-PyTorch memory, this "
        "process has 17179869184.00 GiB memory in use. Of the allocated memory 13.67 GiB is "
        "allocated by PyTorch, and 9.62 MiB is reserved by PyTorch but unallocated.",
        {"free_bytes": 0, "process_bytes": None, "allocated_bytes": 13.67 * GiB},
    ),
    # a fraction of the card, as a public test of another project keeps it
    "a memory fraction": (
        "CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacity of 47.37 GiB "
        "of which 46.57 GiB is free. Including non-PyTorch memory, this process has 772.00 MiB "
        "memory in use. 800.55 MiB allowed; Of the allocated memory 245.48 MiB is allocated by "
        "PyTorch, and 16.52 MiB is reserved by PyTorch but unallocated.",
        {"allowed_bytes": 800.55 * MiB, "process_bytes": 772 * MiB},
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_read_as_it_is_worded(name):
    text, expected = MESSAGES[name]
    found = parse_message(text)
    assert found.speaker == "torch"
    for field, size in expected.items():
        value = getattr(found, field)
        if field == "device" or size is None:
            assert value == size, field
        else:
            assert value.low <= size <= value.high, field
            assert value.expected == pytest.approx(size, abs=2), field


def test_a_printed_size_stands_for_all_that_is_rounded_to_it():
    tried = parse_message(MESSAGES["WSL"][0]).tried_bytes
    assert (tried.low, tried.high) == pytest.approx((1.945 * GiB, 1.955 * GiB), abs=2)


def test_torchs_own_warning_has_whole_numbers():
    found = parse_message(
        "[W1009 21:05:01.3 CUDACachingAllocator.cpp:3934] memory allocation failed with OOM on "
        "device 3 while trying to allocate 67108864 bytes (free: 20316160, total: 23745396736)."
    )
    assert found.device == 3
    assert (found.tried_bytes.low, found.tried_bytes.high) == (67108864, 67108864)
    assert (found.free_bytes.expected, found.total_bytes.expected) == (20316160, 23745396736)


def test_a_message_that_a_traceback_has_broken_and_framed_is_read():
    framed = MESSAGES["torch 2.1"][0].replace(" of ", "  │\n│ of ").replace("GiB", "\x1b[1mGiB")
    assert parse_message(framed) == parse_message(MESSAGES["torch 2.1"][0])


def test_of_several_messages_the_first_is_read():
    two = f"{MESSAGES['torch 1.4'][0]}\n{MESSAGES['torch 2.1'][0]}"
    assert parse_message(two) == parse_message(MESSAGES["torch 1.4"][0])


@pytest.mark.parametrize(
    ("text", "speaker"),
    [
        # bitsandbytes-foundation/bitsandbytes#959 and jllllll/bitsandbytes-windows-webui#14
        (
            "Error out of memory at line 380 in file /mmfs1/gscratch/zlab/timdettmers/git/"
            "bitsandbytes/csrc/pythonInterface.c",
            "bitsandbytes",
        ),
        (
            r"Error out of memory at line 88 in file D:\a\bitsandbytes-windows-webui\csrc\ops.cu",
            "bitsandbytes",
        ),
        # oobabooga/textgen#963
        (
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
            "`cublasCreate(handle)`",
            "cuBLAS",
        ),
        # PKU-YuanGroup/Open-Sora-Plan#386
        ("[0] enqueue.cc:1085 NCCL WARN Cuda failure 'out of memory'", "NCCL"),
        ("RuntimeError: CUDA error: out of memory", "the CUDA runtime"),
    ],
)
def test_other_libraries_are_told_from_torch(text, speaker):
    assert parse_message(text).speaker == speaker


def test_nccl_names_the_size_of_its_buffer():
    # NVIDIA/nccl#962
    found = parse_message(
        "node:2134736:2285781 [0] include/alloc.h:178 NCCL WARN Cuda failure 'out of memory'\n"
        "node:2134736:2285781 [0] include/alloc.h:185 NCCL WARN Failed to CUDA calloc 6291456 bytes"
    )
    assert found.tried_bytes.expected == 6291456


NVIDIA_SMI = """\
|   0  NVIDIA A100-SXM4-80GB          On  | 00000000:07:00.0 Off |                    0 |
| N/A   34C    P0              61W / 400W |  40536MiB / 81920MiB |      0%      Default |
|   1  NVIDIA A100-SXM4-80GB          On  | 00000000:0B:00.0 Off |                    0 |
| N/A   31C    P0              60W / 400W |      4MiB / 81920MiB |      0%      Default |
"""


def test_of_an_nvidia_smi_table_the_fullest_card_is_read():
    found = parse_message(NVIDIA_SMI)
    assert (found.speaker, found.device) == ("nvidia-smi", 0)
    assert found.used_bytes.expected == 40536 * MiB
    assert found.total_bytes.expected == 81920 * MiB


@pytest.mark.parametrize(
    "text",
    ["", "Killed", "MPS backend out of memory (MPS allocated: 8.00 GB)", "out of memory " * 9],
)
def test_a_text_without_a_known_message_is_refused_in_one_line(text):
    with pytest.raises(InvalidRequestError, match="paste the line that begins with") as refusal:
        parse_message(text)
    assert "\n" not in str(refusal.value)


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(InvalidRequestError, match="longer than"):
        parse_message("x" * (MAX_MESSAGE_CHARACTERS + 1))
