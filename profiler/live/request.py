"""From a live run to the request document that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from profiler.live import batch, loop, method, optimizer, weights
from profiler.live.findings import Findings


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What a Trainer hands to its callbacks when training begins.

    Args:
        args: its TrainingArguments, or TRL's SFTConfig.
        model: the model that is trained, with PEFT's adapters in it.
        optimizer: the optimizer that will step.
        dataloader: of the training set.
        tokenizer: its processing class, if it has one.
        micro_batch_size: sequences in one forward pass.
    """

    args: Any
    model: Any
    optimizer: Any
    dataloader: Any
    tokenizer: Any
    micro_batch_size: int


def document(run: LiveRun, findings: Findings, *, seq_len: int | None = None) -> dict[str, Any]:
    """Return the request document of a live run, but for its hardware.

    Args:
        seq_len: the longest sequence, where the user names it.

    Raises:
        UnsupportedCombinationError: something of the run has no word in the document.
    """
    args, model = run.args, run.model
    loop.refuse_many_gpus(args, model, findings)
    weights.refuse_other_models(model, findings)
    software = loop.software(args, findings)
    checkpointing = loop.checkpointing(model, software, findings)
    kernels, loss = loop.kernels_and_loss(args, software, findings)
    found = batch.batch(args, model, run.tokenizer, run.dataloader, seq_len, findings)
    config = weights.config_of(model)
    request: dict[str, Any] = {
        "model": {"config": config},
        "method": method.method(model, config, findings),
        **_precision(run, findings),
        "optimizer": optimizer.optimizer(args, run.optimizer, findings),
        "micro_batch_size": run.micro_batch_size,
        "seq_len": found.seq_len,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "padding": found.padding,
        "packing": found.packing,
        "activation_checkpointing": checkpointing,
        "attention": loop.attention(model, findings),
        "loss": loss,
        "kernels": kernels,
        "loop": loop.loop(args, model, checkpointing != "none"),
        "software": software,
    }
    findings.refuse_unknown()
    return request


def _precision(run: LiveRun, findings: Findings) -> dict[str, Any]:
    """Return how weights are stored and computed with; fp32 under autocast has words of its own."""
    fields = weights.precision(run.model, findings)
    autocast = loop.autocast(run.args, findings)
    if autocast is None:
        if fields["precision"] == "fp32" and run.args.tf32 and "quantization" not in fields:
            fields["precision"] = "tf32"
        return fields
    if fields["precision"] == "fp32" and "quantization" not in fields:
        return {**fields, "precision": f"amp_{autocast}"}
    return {**fields, "autocast": autocast}
