"""DeepSpeed's estimators of model states: ZeRO 3 where a run is sharded, ZeRO 2 on one GPU."""

from __future__ import annotations

from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from benchmarks.peers.case import Case


def answer(case: Case) -> int:
    """Return the GPU's part, without offload [bytes]."""
    case.only_methods("full")
    case.only_optimizers("adamw")
    if case.sharding == "none":
        _, gpu = estimate_zero2_model_states_mem_needs(
            total_params=case.parameters, num_gpus_per_node=1, cpu_offload=False
        )
        return int(gpu)
    _, gpu, _ = estimate_zero3_model_states_mem_needs(
        total_params=case.parameters,
        largest_layer_params=largest_layer(case),
        num_gpus_per_node=case.gpus,
        cpu_offload=False,
        cpu_offload_params=False,
    )
    return int(gpu)


def largest_layer(case: Case) -> int:
    """Return the parameters of the largest single module: a matrix of the MLP or the embedding."""
    hidden = int(case.config["hidden_size"])
    names = ("vocab_size", "intermediate_size", "n_inner")
    return hidden * max(int(case.config.get(name) or 0) for name in names)
