"""`torch-preflight`: the cost model behind its command `estimate`.

LoRA is said by the share of frozen parameters, as its own suggestions say it.
"""

from __future__ import annotations

from typing import Final

from torch_preflight import vram

from benchmarks.peers.case import CannotExpressError, Case

PRECISIONS: Final = {
    "fp32": vram.PrecisionMode.FP32,
    "amp": vram.PrecisionMode.AMP,
    "master": vram.PrecisionMode.FP16_MASTER,
}
SIXTEEN: Final = {"bf16": vram.PrecisionMode.PURE_BF16, "fp16": vram.PrecisionMode.PURE_FP16}
OPTIMIZERS: Final = {
    "adamw": vram.OptimizerKind.ADAMW,
    "adamw-8bit": vram.OptimizerKind.ADAM_8BIT,
    "adafactor": vram.OptimizerKind.ADAFACTOR,
    "sgd": vram.OptimizerKind.SGD,
}
GPUS: Final = {
    "A100 80GB": "a100-80gb",
    "A100-SXM4-40GB": "a100-40gb",
    "V100-SXM2 16GB": "v100-16gb",
    "H100 80GB": "h100-80gb",
    "RTX 3090": "rtx3090",
    "RTX 4090": "rtx4090",
}


def answer(case: Case) -> tuple[int, int]:
    """Return the total, and the same without context and fragmentation [bytes]."""
    case.only_methods("full", "lora")
    case.only_optimizers(*OPTIMIZERS)
    case.only_checkpointing("none", "full")
    case.only_plain_kernels()
    if case.method == "lora" and case.trainable is None:
        raise CannotExpressError("no LoRA by rank, and its parameters are not counted here")
    profile = vram.resolve_profile(case.model, allow_network=True)
    if not profile.resolved:
        raise CannotExpressError(f"it says: {profile.reason}")
    frozen = 0.0
    if case.method == "lora" and case.trainable is not None:
        frozen = 1 - case.trainable / profile.param_count
    report = vram.estimate_config(
        profile,
        vram.RunConfig(
            batch_size=case.micro_batch_size,
            seq_len=case.seq_len,
            precision=PRECISIONS.get(case.precision) or SIXTEEN[case.base],
            optimizer=OPTIMIZERS[case.optimizer],
            gradient_checkpointing=case.checkpointing == "full",
            flash_attention=case.attention != "eager",
            accumulation_steps=case.accumulation,
            world_size=case.gpus,
            sharding=vram.Sharding.NONE if case.sharding == "none" else vram.Sharding.ZERO3,
            frozen_fraction=frozen,
        ),
        gpu=GPUS.get(case.gpu or ""),
        with_remediations=False,
    )
    parts = report.breakdown
    return report.total, report.total - parts.cuda_context - parts.fragmentation
