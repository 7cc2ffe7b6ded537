"""Why a request failed and which tensor asked, on messages from issues that name their recipe."""

import pytest

from estimator.service import reconcile

GIB = 2**30
# modelscope/ms-swift#411: full fine-tuning of a Mistral 7B on an A100, swift's defaults but
# 4096 tokens and FlashAttention; the traceback ends in `_multi_tensor_adamw`, at
# `denom = torch._foreach_add(exp_avg_sq_sqrt, eps)`.
SWIFT = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB (GPU 0; 79.15 "
    "GiB total capacity; 76.61 GiB already allocated; 112.38 MiB free; 77.55 GiB reserved in "
    "total by PyTorch)"
)
SWIFT_REQUEST = {
    "model": "mistralai/Mistral-7B-v0.1",
    "optimizer": "adamw_torch",
    "seq_len": 4096,
    "activation_checkpointing": "full",
    "attention": "flash_attention_2",
    "software": {"version": "4.45"},
}


def test_the_tensor_and_the_moment_are_those_of_the_traceback():
    found = reconcile({"request": SWIFT_REQUEST, "message": SWIFT}).out_of_memory
    first = found.askers[0]
    assert first.moment == "optimizer step"
    assert "foreach" in first.tensor
    # bf16, [14336, 4096]: the projections of the MLP.
    assert first.size_bytes == 2 * 14336 * 4096


def test_the_second_list_of_torch_2_0_would_explain_what_that_run_needed():
    found = reconcile({"request": SWIFT_REQUEST, "message": SWIFT})
    assert found.reading.bound == "at_least"
    assert found.inside is False
    assert found.hypotheses[0].terms == ("foreach of torch 2.0",)


def test_the_logits_in_fp32_are_found_by_their_size():
    # 4 bytes x 4096 tokens x 128256 words, which torch prints as 1.96 GiB.
    tried = 4 * 4096 * 128256
    message = (
        f"CUDA out of memory. Tried to allocate {tried / GIB:.2f} GiB. GPU 0 has a total capacity "
        "of 23.69 GiB of which 0.30 GiB is free. Including non-PyTorch memory, this process has "
        "23.30 GiB memory in use. Of the allocated memory 21.90 GiB is allocated by PyTorch, and "
        "0.60 GiB is reserved by PyTorch but unallocated."
    )
    request = {
        "model": "meta-llama/Llama-3.1-8B",
        "method": "lora",
        "seq_len": 4096,
        "activation_checkpointing": "full",
    }
    askers = reconcile({"request": request, "message": message}).out_of_memory.askers
    assert {each.moment for each in askers} <= {"loss forward", "loss backward", "forward: head"}
    assert any("logits in fp32" in each.tensor for each in askers)


CAUSES = {
    # a public tutorial on fragmentation: 4.11 GiB in pieces for a request of 3.15 GiB
    "fragmentation": (
        "CUDA out of memory. Tried to allocate 3.15 GiB. GPU 0 has a total capacity of 39.56 GiB "
        "of which 1.80 GiB is free. Including non-PyTorch memory, this process has 36.61 GiB "
        "memory in use. Of the allocated memory 31.66 GiB is allocated by PyTorch, and 4.11 GiB is "
        "reserved by PyTorch but unallocated."
    ),
    # a public evaluation log: two processes on one card of 47.41 GiB
    "others": (
        "CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of 47.41 GiB "
        "of which 8.38 MiB is free. Process 375949 has 20.04 GiB memory in use. Including "
        "non-PyTorch memory, this process has 27.34 GiB memory in use. Of the allocated memory "
        "27.02 GiB is allocated by PyTorch, and 2.80 MiB is reserved by PyTorch but unallocated."
    ),
    # transformers#36097
    "shortage": (
        "CUDA out of memory. Tried to allocate 150.00 MiB. GPU 0 has a total capacity of 3.80 GiB "
        "of which 130.31 MiB is free. Including non-PyTorch memory, this process has 3.66 GiB "
        "memory in use. Of the allocated memory 3.52 GiB is allocated by PyTorch, and 53.87 MiB "
        "is reserved by PyTorch but unallocated."
    ),
    "limit": (
        "CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacity of 47.37 GiB "
        "of which 46.57 GiB is free. Including non-PyTorch memory, this process has 772.00 MiB "
        "memory in use. 800.55 MiB allowed; Of the allocated memory 245.48 MiB is allocated by "
        "PyTorch, and 16.52 MiB is reserved by PyTorch but unallocated."
    ),
    # a public log: 4.92 GiB free for a request of 20 MiB
    "freed meanwhile": (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 6.00 GiB "
        "of which 4.92 GiB is free. Of the allocated memory 49.22 MiB is allocated by PyTorch, "
        "and 2.78 MiB is reserved by PyTorch but unallocated."
    ),
    "outside torch": "[0] enqueue.cc:1085 NCCL WARN Cuda failure 'out of memory'",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_first_finding_is_what_kept_the_request_from_succeeding(cause):
    found = reconcile({"message": CAUSES[cause]}).out_of_memory
    assert found.findings[0].cause == cause
    assert found.findings[0].advice


def test_a_message_alone_is_read_without_a_request():
    found = reconcile({"message": CAUSES["shortage"]})
    assert found.request is None
    assert found.hypotheses == ()
    assert found.message.startswith("Shortage: the tensors need at least 3.67 GiB")


def test_the_card_of_the_message_is_what_suggestions_are_judged_by():
    request = {"model": "gpt2", "seq_len": 512}
    found = reconcile({"request": request, "message": CAUSES["shortage"]})
    assert found.request["hardware"]["memory_bytes"] == round(3.80 * GIB)
    assert found.out_of_memory.suggestions
