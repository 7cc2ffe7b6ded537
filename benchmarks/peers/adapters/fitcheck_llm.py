"""`fitcheck`: its Python interface, which the command calls too.

Its total is the process on the device: tensors, context and fragmentation. Its own accuracy pages
keep the tensors apart, and they are what an allocated peak is compared with.
"""

from __future__ import annotations

from typing import Any, Final

import fitcheck

from benchmarks.peers.case import CannotExpressError, Case

MIB: Final = 2**20
GPUS: Final = {
    "A100 80GB": "a100-80",
    "A100-SXM4-40GB": "a100-40",
    "V100-SXM2 16GB": "v100-16",
    "RTX 3090": "3090",
    "RTX 4090": "4090",
}
QUANTIZATIONS: Final = {"nf4": "nf4", "nf4-dq": "nf4"}
OPTIMIZERS: Final = {"adamw": "adamw", "adamw-8bit": "adam8bit", "sgd": "sgd"}


def answer(case: Case) -> tuple[float, float]:
    """Return the total, and the tensors alone [bytes]."""
    case.only_one_gpu()
    case.only_methods("full", "lora", "qlora")
    case.only_optimizers(*OPTIMIZERS)
    case.only_checkpointing("none", "full")
    case.only_plain_kernels()
    case.only_precisions("fp32", "pure", "master")
    if case.method == "qlora" and case.base not in QUANTIZATIONS:
        raise CannotExpressError(f"no quantization {case.base}")
    report = fitcheck.estimate(model(case), training(case), gpu(case.gpu))
    return report.total_mib * MIB, (report.total_mib - report.overhead_mib) * MIB


def model(case: Case) -> Any:
    """Return the model as it reads it from the Hub, which also tells it the true count."""
    try:
        return fitcheck.fetch_model_config(case.model)
    except fitcheck.UnsupportedModelError as error:
        mixture = "Mixture-of-Experts" in str(error)
        why = "mixture of experts" if mixture else "its own parameter count is over 2 % off"
        raise CannotExpressError(f"it refuses the model: {why}") from None


def training(case: Case) -> Any:
    """Return the run in its words.

    `optimizer_dtype` is that of AdamW's states, which for 16-bit weights are 16-bit without a
    master copy. Its adapters are always fp32.
    """
    plain = case.base if case.method != "qlora" else "bf16"
    states = {"optimizer_dtype": "bf16"} if narrow_states(case) else {}
    return fitcheck.TrainingConfig(
        precision=plain,
        quantization=QUANTIZATIONS.get(case.base, "none"),
        double_quant=case.base == "nf4-dq",
        optimizer=OPTIMIZERS[case.optimizer],
        batch_size=case.micro_batch_size,
        seq_len=case.seq_len,
        lora_rank=None if case.method == "full" else case.rank,
        lora_targets=list(case.targets),
        grad_checkpoint=case.checkpointing == "full",
        flash_attn=case.attention != "eager",
        grad_accum_steps=case.accumulation,
        **states,
    )


def narrow_states(case: Case) -> bool:
    """Whether AdamW's states are 16-bit numbers."""
    return case.method == "full" and case.optimizer == "adamw" and case.precision == "pure"


def gpu(name: str | None) -> Any:
    """Return its own GPU, or one of 80 GiB where the row names none."""
    known = GPUS.get(name or "")
    return fitcheck.get_gpu(known) if known else fitcheck.get_gpu(None, vram_mib=80 * 1024)
