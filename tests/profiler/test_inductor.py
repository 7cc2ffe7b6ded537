"""The compiled dry run: inductor's own code, run without kernels, is what the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from estimator.memory.caching_allocator import LARGE_SEGMENT_BYTES
from estimator.pipeline import answer
from estimator.request import parse_request
from profiler import engine, inductor, trace

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 1100, "vocab_size": 4000,
    "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_compiled_step_allocates_what_the_formula_says():
    request = parse_request(
        {
            "model": {"config": LLAMA}, "kernels": ["compile"], "optimizer": "adamw_torch",
            "micro_batch_size": 4, "seq_len": 500,
        }
    )  # fmt: skip
    reading = trace.read(engine.trace(request, LLAMA))
    found = answer(request, LLAMA, "model", None)
    assert reading.peak.phase == "backward"
    assert found.peak.moment.startswith("backward")
    assert found.peak.allocated_bytes.expected == pytest.approx(
        reading.peak.allocated_bytes, rel=0.01
    )


def test_a_compiled_and_checkpointed_step_holds_what_the_formula_says_to_within_a_segment():
    config = LLAMA | {
        "hidden_size": 512, "intermediate_size": 3072, "vocab_size": 24000, "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }  # fmt: skip
    request = parse_request(
        {
            "model": {"config": config}, "kernels": ["compile"], "activation_checkpointing": "full",
            "optimizer": {"name": "adamw", "implementation": "fused"}, "micro_batch_size": 8,
            "seq_len": 256, "loop": {"own_loss": True, "max_grad_norm": 0.0},
        }
    )  # fmt: skip
    reading = trace.read(engine.trace(request, config))
    found = answer(request, config, "model", None)
    assert found.peak.reserved_bytes.expected == pytest.approx(
        reading.reserved_bytes, abs=LARGE_SEGMENT_BYTES
    )


def test_code_that_inductor_wrote_runs_without_its_kernels():
    source = '''
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda
scale_0 = async_compile.triton('scale_0', """import triton""", device_str='cuda')

class Runner:
    def call(self, args):
        x, = args
        args.clear()
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = empty_strided_cuda((2, 4), (4, 1), torch.float32)
            scale_0.run(x, buf0, 8, stream=get_raw_stream(0))
            buf1 = reinterpret_tensor(buf0, (4, 2), (2, 1), 0); del buf0  # reuse
            buf2 = empty_strided_cuda((4, 4), (4, 1), torch.float32)
            extern_kernels.mm(buf1, x, out=buf2)
        return (buf1, buf2)

runner = Runner()
call = runner.call
'''
    given = [torch.ones(2, 4)]
    viewed, product = inductor._runnable(source)(given)
    assert given == []
    assert viewed.shape == (4, 2)
    assert product.shape == (4, 4)
