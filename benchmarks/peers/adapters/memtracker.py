"""torch's `MemTracker` around two steps of a model of transformers, on fake CPU tensors.

It counts the tensors of whatever step it is shown, so the step is written here, as a user would
write it: a model of the installed transformers, the optimizer's kernels as on a GPU (`foreach` or
`fused`), logits dropped after backward. Kernels that exist on GPUs only are not called: flash
attention becomes `sdpa`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.case import CannotExpressError, Case

CPU: Final = torch.device("cpu")
FORMATS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS: Final = 2


def answer(case: Case) -> tuple[int, int]:
    """Return the total of the peak snapshot, which is of tensors alone [bytes]."""
    if case.sharding != "none":
        raise CannotExpressError("sharding needs a process group, which is not started")
    case.only_in_transformers()
    if case.method != "full":
        raise CannotExpressError("it hooks every gradient, and frozen weights have none")
    case.only_optimizers("adamw", "sgd")
    case.only_checkpointing("none", "full")
    case.only_precisions("fp32", "amp", "pure")
    case.only_plain_kernels()
    if case.task != "causal-lm":
        raise CannotExpressError("its step is a causal model with the loss of transformers")
    total = tracked(case)
    return total, total


def tracked(case: Case) -> int:
    """Run the steps and return the highest total [bytes]."""
    model = prepared(case)
    with FakeTensorMode():
        placed(model)
        kind = torch.optim.AdamW if case.optimizer == "adamw" else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=1e-3, foreach=not case.fused, fused=case.fused)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        for _ in range(STEPS):
            with tracker:
                step(model, optimizer, case)
            tracker.reset_mod_stats()
        return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


def step(model: Any, optimizer: Any, case: Case) -> None:
    """One step, without accumulation: micro-batches come one after the other."""
    tokens = torch.zeros(case.micro_batch_size, case.seq_len, dtype=torch.long)
    autocast = (
        torch.autocast("cpu", dtype=torch.bfloat16)
        if case.precision == "amp"
        else contextlib.nullcontext()
    )
    with autocast:
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def prepared(case: Case) -> Any:
    """Return the model on the meta device, with checkpointing as the case has it."""
    known = dict(case.config)
    config = AutoConfig.for_model(known.pop("model_type"), **known)
    attention = "eager" if case.attention == "eager" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=FORMATS[case.base], attn_implementation=attention
        )
    model.config.use_cache = False
    if case.checkpointing == "full":
        model.gradient_checkpointing_enable()
    return model.train()


def placed(model: Any) -> None:
    """Put a fake CPU tensor in place of every one on the meta device; tied ones stay tied."""
    new: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    tensors[name] = new.setdefault(id(old), like(old))


def like(old: Any) -> Any:
    """Return a fake CPU tensor, or parameter, of the same shape and type."""
    tensor = torch.empty(old.shape, dtype=old.dtype, device=CPU)
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    return tensor
