"""What every peer is told about a published run. Imported inside the peers' environments too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

# fp32: all fp32. amp: fp32 weights, 16-bit computation. pure: 16 bits throughout, or 16 bits
# beside a quantized base. master: 16-bit weights and gradients, fp32 copies in the optimizer.
Precision = Literal["fp32", "amp", "pure", "master"]
Sharding = Literal["none", "fsdp", "zero3"]


class CannotExpressError(Exception):
    """The peer's interface has no words for the case; the message says which."""


@dataclass(frozen=True, slots=True)
class Case:
    """One published run in the words that calculators share.

    Args:
        model: the model's name on the Hub.
        config: its configuration, as in `config.json`.
        parameters: its parameters, tied tensors counted once.
        method: full, lora, qlora, or what else the source calls it.
        rank, targets: of LoRA; targets as transformers' Llama names them.
        trainable: parameters with a gradient, where the source or our own answer counts them.
        base: how frozen weights are stored: fp32, bf16, fp16, nf4, nf4-dq, gptq-int4 or gptq-int8.
        optimizer: adamw, adamw-8bit, adamw-4bit, adafactor, sgd or lomo.
        fused: whether the optimizer steps by one fused kernel; torch's default is foreach.
        seq_len: tokens of one sample [tokens].
        attention: flash_attention_2, sdpa or eager.
        kernels: fused kernels with a loss of their own, liger or foak; empty without.
        gpus: how many the run is spread over; every figure is for one of them.
    """

    id: str
    model: str
    config: Mapping[str, Any]
    parameters: int
    method: str
    rank: int | None
    targets: tuple[str, ...]
    trainable: int | None
    base: str
    precision: Precision
    optimizer: str
    fused: bool
    in_backward: bool
    micro_batch_size: int
    seq_len: int
    accumulation: int
    checkpointing: str
    attention: str
    kernels: str
    sharding: Sharding
    gpus: int
    gpu: str | None
    task: str

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Case:
        """Read what `to_json` wrote."""
        fields = json.loads(line)
        return cls(**{**fields, "targets": tuple(fields["targets"])})

    # -- what several peers refuse, in one wording ----------------------------------------------

    def only_one_gpu(self) -> None:
        """Refuse a run that is spread over several GPUs."""
        if self.sharding != "none":
            raise CannotExpressError("no sharding")

    def only_in_transformers(self) -> None:
        """Refuse a model whose code is beside its weights: it is never run here."""
        if self.config.get("model_type") in REMOTE:
            raise CannotExpressError("it would run the model's remote code")

    def only_methods(self, *known: str) -> None:
        """Refuse every other method."""
        if self.method not in known:
            raise CannotExpressError(f"no {self.method}")

    def only_optimizers(self, *known: str) -> None:
        """Refuse every other optimizer, and a step inside backward."""
        if self.optimizer not in known:
            raise CannotExpressError(f"no {self.optimizer}")
        if self.in_backward:
            raise CannotExpressError("no optimizer step inside backward")

    def only_precisions(self, *known: Precision) -> None:
        """Refuse every other arrangement of number formats."""
        if self.precision not in known:
            raise CannotExpressError(f"no {WORDS[self.precision]}")

    def only_plain_kernels(self) -> None:
        """Refuse fused kernels, for a peer that counts activations."""
        if self.kernels:
            raise CannotExpressError(f"no kernels of {self.kernels}")

    def only_checkpointing(self, *known: str) -> None:
        """Refuse every other form of checkpointing."""
        if self.checkpointing not in known:
            raise CannotExpressError(f"no {self.checkpointing} checkpointing")


# Types of the rows' models that transformers does not know.
REMOTE = frozenset({"qwen"})

WORDS = {
    "fp32": "training in fp32 throughout",
    "amp": "fp32 weights under autocast",
    "pure": "training in 16 bits throughout",
    "master": "16 bits with fp32 master weights in the optimizer",
}
