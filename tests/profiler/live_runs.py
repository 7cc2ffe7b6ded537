"""Tiny real runs of the Trainer on the CPU, and a meter that says what a test tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estimator.record import Environment, Meters, Origin
from profiler.live.device import Look

LLAMA: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


class FakeMeter:
    """A device of a chosen size; every reading is what the test gives.

    Args:
        free: bytes that nobody uses.
        peaks: the readings of `max_memory_allocated`, one for each look; the last one stays.
    """

    def __init__(self, free: int, *, peaks: tuple[int, ...] = (1,), **look: Any) -> None:
        self.peaks = list(peaks)
        self.resets = 0
        self.looked_at = Look(
            **{"name": "a card of the test", "total": 2**40, "free": free, "allocated": 0,
               "reserved": 0, **look}
        )  # fmt: skip

    @property
    def origin(self) -> Origin:
        """Nothing here was read from a device."""
        return "simulated"

    def look(self) -> Look:
        """Return what the test said."""
        return self.looked_at

    def peak(self) -> Meters:
        """Return the next reading."""
        peak = self.peaks.pop(0) if len(self.peaks) > 1 else self.peaks[0]
        return Meters(allocated_bytes=peak, reserved_bytes=peak)

    def reset(self) -> None:
        """Count the resets."""
        self.resets += 1

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def environment(self) -> Environment:
        """Return nothing that could be taken for a device."""
        return Environment(versions={"torch": "of the test"})


def llama(**changes: Any) -> Any:
    """Return a tiny Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = changes.pop("dtype", torch.float32)
    attention = changes.pop("attention", "sdpa")
    config = LlamaConfig(**{**LLAMA, **changes})
    config._attn_implementation = attention
    return LlamaForCausalLM(config).to(dtype)


def samples(*lengths: int) -> list[dict[str, list[int]]]:
    """Return tokenized samples of these lengths."""
    return [{"input_ids": [1] * each, "labels": [1] * each} for each in lengths]


def trainer(
    folder: Path,
    callback: Any,
    model: Any,
    data: Any = None,
    collator: Any = None,
    **arguments: Any,
) -> Any:
    """Return a Trainer on the CPU with a callback."""
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=data if data is not None else samples(*[16] * 8),
        data_collator=collator,
        callbacks=[callback],
    )
