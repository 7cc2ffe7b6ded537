"""What the layer of CUDA semantics tells the code that is traced."""

from __future__ import annotations

import torch

from profiler.cuda_semantics import cuda_semantics


def test_autocast_is_seen_by_code_that_asks_without_a_device() -> None:
    # peft 0.21.2, tuners/lora/bnb.py, Linear4bit.forward: `not torch.is_autocast_enabled()`
    with cuda_semantics((8, 0)):
        outside = torch.is_autocast_enabled()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = torch.is_autocast_enabled()
    assert (outside, inside) == (False, True)
