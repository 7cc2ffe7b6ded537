"""From a published row to a request document, or to the reason why there is none.

Rules are written for a source, never for a row: they read the row's own fields, and what the row
leaves to its source (entry point, versions, defaults) is named with the place where it was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from benchmarks.accuracy.meters import meter_of
from benchmarks.accuracy.published import Row, sample_lengths


class InexpressibleError(Exception):
    """The request document has no words for this row; the message is the reason."""


Refusal = Callable[[Row], "str | None"]


def request_of(row: Row) -> dict[str, Any]:
    """Return the request document of a row.

    Raises:
        InexpressibleError: with the first reason that applies.
    """
    for refusal in REFUSALS:
        reason = refusal(row)
        if reason is not None:
            raise InexpressibleError(reason)
    rule = RULES.get(row.source_group)
    if rule is None:
        raise InexpressibleError("no rule for this source")
    return rule(row)


# -- reasons against ---------------------------------------------------------------------------


def _no_training_step(row: Row) -> str | None:
    return {
        "loss_component": "not a training step: head and loss alone",
        "max_context_claim": "not a measurement: a claimed maximum length",
    }.get(row.kind)


def _no_meter(row: Row) -> str | None:
    if row.metric == "component profile total":
        return "not a meter: a sum of components"
    return None


def _sharding(row: Row) -> str | None:
    kind = row.parallelism["kind"]
    return f"sharding: {kind}" if kind != "none" or row.parallelism["gpus"] != 1 else None


def _method(row: Row) -> str | None:
    known = ("full", "lora", "qlora", "gptq-lora", "adapter", "adapter_v2", "lomo")
    return f"method: {row.method}" if row.method not in known else None


# Frameworks that train models of their own code, not those of transformers.
OWN_MODEL_CODE: Final = {
    "torchtitan": "torchtitan",
    "torchao benchmark script": "torchao",
    "unsloth": "unsloth",
}


def _model_code(row: Row) -> str | None:
    name = OWN_MODEL_CODE.get(row.framework)
    return f"model code: {name}'s own, not that of transformers" if name else None


def _task(row: Row) -> str | None:
    classifies = (row.loss_impl or "").startswith("sequence classification")
    return "task: sequence classification" if classifies else None


def _weights(row: Row) -> str | None:
    found = re.search(r"gptq|int8", row.weights_dtype or "")
    if row.method == "gptq-lora":
        return None
    return f"quantization format: {found[0]}" if found else None


# The beginning of a row's `loss_impl`, and what it is called here.
OTHER_LOSSES: Final = {"liger": "loss: fused linear (Liger)"}


def _loss(row: Row) -> str | None:
    loss = row.loss_impl or ""
    return next((reason for key, reason in OTHER_LOSSES.items() if loss.startswith(key)), None)


# Sources whose rule asks for the compiled model.
COMPILED: Final = ("usamec",)


def _compile(row: Row) -> str | None:
    return "torch.compile" if row.compile and row.source_group not in COMPILED else None


def _unstated(row: Row) -> str | None:
    if row.micro_batch_size is None or _length(row) is None:
        return "micro-batch or length not stated"
    return None


def _unknown_meter(row: Row) -> str | None:
    if row.kind != "oom" and meter_of(row.metric) is None:
        return "meter not stated"
    return None


REFUSALS: Final[tuple[Refusal, ...]] = (
    _no_training_step, _no_meter, _sharding, _method, _model_code, _task, _weights, _loss,
    _compile, _unstated, _unknown_meter,
)  # fmt: skip


# -- rules by source ---------------------------------------------------------------------------

# torchtune cut Alpaca's samples to 512 tokens from commit 73647e26e (30 March 2024, #620: the
# default of `max_seq_len` in datasets/_alpaca.py) until the tokenizer took the length over; the
# tables of March are older, torchao's of September younger.
ALPACA_CUT: Final = 512
CUT_ROWS: Final = ("tt2404", "ttdoc")
ALPACA: Final = ("Alpaca(-cleaned) unpacked", "Alpaca unpacked (torchtune)")
_PACKED: Final = re.compile(r"packed \(SFTTrainer packing\), max_seq_length (\d+)")
ATTENTION: Final = {"flash2": "flash_attention_2", "eager": "eager"}
CHECKPOINTING: Final = {"full": "full", "none": "none"}
GPUS: Final = {"A100 80GB": "a100-80gb"}

# Copies of a model under another name.
COPIES: Final = {
    "NousResearch/Llama-2-70b-hf": "meta-llama/Llama-2-70b-hf",
    "TheBloke/Mistral-7B-v0.1-GPTQ": "mistralai/Mistral-7B-v0.1",
}


def _length(row: Row) -> int | None:
    """Return the length: its field, that of the packed samples, or that of the longest one."""
    if row.seq_len is not None:
        return row.seq_len
    if (row.seq_mode or "").startswith(ALPACA):
        return longest_of_alpaca(row)
    packed = _PACKED.match(row.seq_mode or "")
    return int(packed[1]) if packed else None


def longest_of_alpaca(row: Row) -> int:
    """Return the longest batch that a row's source makes of Alpaca [tokens].

    No source says how many batches were run; the longest of the samples that are known counts.
    """
    longest = max(alpaca_lengths(row))
    return min(longest, ALPACA_CUT) if row.id.startswith(CUT_ROWS) else longest


def alpaca_lengths(row: Row) -> tuple[int, ...]:
    """Return the lengths of samples of the Alpaca that a row's recipe trains on [tokens].

    The configurations for adapters name the cleaned one (`use_clean`, `alpaca_cleaned_dataset`),
    those for full training the first one (`alpaca_dataset`): recipes/configs/llama2 at 5cbc1967b,
    fef3ed10d and, in torchao's table, 52d1b838.
    """
    return sample_lengths("tatsu-lab/alpaca" if row.method == "full" else "yahma/alpaca-cleaned")


def _common(row: Row) -> dict[str, Any]:
    return {
        "model": COPIES.get(row.model, row.model),
        "precision": "bf16",
        "autocast": "bf16" if (row.precision or "").startswith("amp_bf16") else None,
        "optimizer": {"name": "adamw", "implementation": "foreach"},
        "micro_batch_size": row.micro_batch_size,
        "seq_len": _length(row),
        "gradient_accumulation_steps": row.grad_accum or 1,
        "activation_checkpointing": CHECKPOINTING[row.activation_checkpointing or "none"],
        "attention": ATTENTION[row.attention_impl or "eager"],
        "hardware": {"gpu": GPUS[row.gpu]} if row.gpu in GPUS else {},
    }


def _fms(row: Row) -> dict[str, Any]:
    """fms-acceleration: TRL's SFTTrainer over a model loaded in bf16.

    transformers 4.48.1, trl 0.13.0, peft 0.13.2, bitsandbytes 0.43.3, torch 2.4.1
    (scripts/benchmarks/refs/requirements.txt). Its `optim` is left at adamw_torch, which is
    foreach there. Adapters are fp32 (PEFT's default). With its own plugin it skips
    `prepare_model_for_kbit_training`; without, TRL calls it. Both quantize the scales too
    (framework_plugin_bnb.py, BNBAccelerationPlugin.model_loader). Over GPTQ its own copy of
    AutoGPTQ's Triton layer trains, in fp16 (framework_plugin_autogptq.py).
    """
    document = {**_common(row), "software": {"version": "4"}}
    if (row.loss_impl or "").startswith("fused triton CE"):
        document["kernels"] = ["foak"]
    detail = row.method_detail
    # The scenario's list names `c_attn` too, which only santacoder has.
    if row.method in ("lora", "qlora", "gptq-lora"):
        document["method"] = {
            "name": "lora",
            "r": detail["rank"],
            "lora_alpha": float(detail["alpha"]),
            "lora_dropout": detail["dropout"],
            "target_modules": detail["target_modules"],
            "adapter_dtype": "float32",
        }
    if row.method == "qlora":
        document["quantization"] = {
            "name": "nf4",
            "double_quant": True,
            "compute_dtype": "bfloat16",
            "prepare_kbit": "prepare_model_for_kbit_training" in detail["quant"],
        }
    if row.method == "gptq-lora":
        # The checkpoint has groups of 128; scenarios.yaml asks for torch_dtype float16 and fp16.
        document |= {"precision": "fp16", "autocast": "fp16"}
        document["quantization"] = {"name": "gptq", "kernel": "autogptq_triton"}
    return document


def _swift(row: Row) -> dict[str, Any]:
    """ms-swift's benchmark of December 2023: HF's Trainer with bf16 autocast over bf16 weights.

    transformers 4.33 to 4.36 and peft 0.7.1 (requirements/framework.txt at 97e4d198b); adapters
    have the type of the weight beside them there. `lora_dropout_p` is 0.05 by default
    (swift/llm/utils/argument.py), DEFAULT targets are the query, key and value projections
    (swift/llm/utils/model.py, LoRATM), 4-bit weights are nf4 with double quantization.
    """
    document = {**_common(row), "autocast": "bf16", "software": {"version": "4.45"}}
    if row.method in ("lora", "qlora"):
        targets = row.method_detail["target_modules"]
        if targets == "DEFAULT":
            targets = ["q_proj", "k_proj", "v_proj"]
        elif targets == "ALL":
            targets = "all-linear"
        document["method"] = {
            "name": "lora",
            "r": row.method_detail["rank"],
            "lora_dropout": 0.05,
            "target_modules": targets if targets == "all-linear" else _names(targets),
            "adapter_dtype": "base",
        }
    if row.method == "qlora":
        document["quantization"] = {"name": "nf4", "double_quant": True, "prepare_kbit": False}
    return document


LITGPT_GPUS: Final = {"A100-SXM4-40GB": "a100-40gb"}


def _litgpt(row: Row) -> dict[str, Any]:
    """Lit-GPT's resource tables: finetune/lora.py at bf16-true, over 1000 iterations.

    The script prints `max_memory_allocated`. The first iteration has the longest sample, and no
    gradients exist in it, so accumulation does not show. LoRA is on queries and values, of the
    weights' own type (fabric.init_module); AdamW is torch's default, foreach; with quantization it
    is bitsandbytes' paged one.
    """
    if row.precision != "bf16_pure":
        raise InexpressibleError("precision: Lightning's bf16-mixed")
    detail = row.method_detail
    optimizer: dict[str, Any] = {"name": "adamw", "implementation": "foreach"}
    quantization = None
    if "quant" in detail:
        optimizer = {"name": "paged_adamw_32bit"}
        quantization = {"name": "nf4", "double_quant": "dq" in detail["quant"]}
        quantization["prepare_kbit"] = False
    method: dict[str, Any]
    if row.method.startswith("adapter"):
        method = {
            "name": f"llama_{row.method}",
            "adapter_prompt_length": detail["adapter_prompt_length"],
            "adapter_start_layer": detail["adapter_start_layer"],
        }
    else:
        method = {
            "name": "lora",
            "r": detail["rank"],
            "lora_dropout": detail["dropout"],
            "target_modules": ["attn"],
            "adapter_dtype": "base",
        }
    return {
        "model": row.model,
        "precision": "bf16",
        "optimizer": optimizer,
        "quantization": quantization,
        "micro_batch_size": row.micro_batch_size,
        "seq_len": row.seq_len,
        "method": method,
        "hardware": {"gpu": LITGPT_GPUS[row.gpu]} if row.gpu in LITGPT_GPUS else {},
        "software": {"framework": "litgpt", "version": "2023.10"},
    }


LAYERS: Final = {"meta-llama/Llama-3.2-1B": 16, "meta-llama/Llama-3.1-8B": 32}


def _lowmem(row: Row) -> dict[str, Any]:
    """usamec/lowmem_finetuning: two scripts with loops of their own over transformers' Llama.

    Only the layers are given to the optimizer. The baseline freezes nothing, keeps fp32 weights,
    compiles the model and computes the loss itself, from a shifted copy of its logits and outside
    autocast; the other script freezes the embeddings and has weights in bf16, no loss over logits,
    and an optimizer of its own inside backward. Autocast to bf16 is on in both, and no gradient is
    clipped. Every row of a batch is padded to 160 tokens.

    Source: usamec/lowmem_finetuning at 6d8dc10f, finetune_base.py and finetune_lowmem.py, main.
    """
    layers = {"name": "partial", "last_layers": LAYERS[row.model]}
    document: dict[str, Any] = {
        "model": row.model,
        "method": layers,
        "micro_batch_size": row.micro_batch_size,
        "seq_len": row.seq_len,
        "padding": True,
        "activation_checkpointing": "full",
    }
    if row.optimizer_in_backward:
        return {
            **document,
            "precision": "bf16",
            "autocast": "bf16",
            "loss": "cut_cross_entropy",
            "optimizer": {"name": "lowmem_adafactor", "in_backward": True},
        }
    adam = {"name": "adam", "implementation": "foreach"}
    return {
        **document,
        "method": {**layers, "freeze_others": False},
        "precision": "amp_bf16",
        "kernels": ["compile"],
        "loop": {"own_loss": True, "max_grad_norm": 0.0},
        "optimizer": adam if "Adam (" in (row.optimizer or "") else {"name": "lowmem_adafactor"},
    }


def _lomo(row: Row) -> dict[str, Any]:
    """LOMO's paper, table 2: fp16 weights, the optimizer in backward, checkpointing.

    The code trains Llama with transformers of spring 2023 under DeepSpeed's launcher; on one GPU
    nothing is sharded.
    """
    return {
        "model": row.model,
        "precision": "fp16",
        "optimizer": {"name": "lomo"},
        "micro_batch_size": row.micro_batch_size,
        "seq_len": row.seq_len,
        "activation_checkpointing": "full",
        "attention": "eager",
        "software": {"version": "4.45"},
    }


TORCHTUNE_NAMES: Final = {"mlp": ("w1", "w2", "w3"), "output head": ("output",)}
TORCHTUNE_OPTIMIZERS: Final[dict[str, dict[str, Any]]] = {
    "torch.optim.AdamW": {"name": "adamw", "implementation": "foreach"},
    "torch.optim.AdamW fused": {"name": "adamw", "implementation": "fused"},
    "bitsandbytes PagedAdamW": {"name": "paged_adamw_32bit"},
    "bitsandbytes AdamW8bit": {"name": "adamw_8bit"},
    "torchao AdamW8bit": {"name": "adamw_torch_8bit"},
    "torchao AdamW4bit": {"name": "adamw_torch_4bit"},
}
# Micro-batches before a step, in the configurations for Llama 2 of April 2024; in March, one.
TORCHTUNE_ACCUMULATION: Final = {"full": 1, "lora": 64, "qlora": 16}


def _torchtune(row: Row) -> dict[str, Any]:
    """torchtune's single-device recipes, with the configurations of the row's commit.

    recipes/configs/llama2: bf16, AdamW of torch at its default, which is foreach, adapters of the
    weights' own type. torchao's table was made with torchtune of September 2024, which computes
    the loss in chunks; batch, checkpointing and `optimizer_in_bwd` are not in it.
    """
    chunked = (row.loss_impl or "").startswith("chunked")
    optimizer = TORCHTUNE_OPTIMIZERS[row.optimizer or ""]
    document: dict[str, Any] = {
        "model": row.model,
        "optimizer": {**optimizer, "in_backward": row.optimizer_in_backward},
        "micro_batch_size": row.micro_batch_size,
        "seq_len": _length(row),
        "activation_checkpointing": CHECKPOINTING[row.activation_checkpointing or "none"],
        "software": {"framework": "torchtune", "version": "0.3" if chunked else "0.1"},
    }
    if row.seq_len is None:
        # A batch is padded to its own longest sample, and no mask is passed.
        document["sample_lengths"] = alpaca_lengths(row)
    if not row.id.startswith("tt2403"):
        document["gradient_accumulation_steps"] = TORCHTUNE_ACCUMULATION[row.method]
    if row.method != "full":
        document["method"] = {
            "name": "lora",
            "r": row.method_detail["rank"],
            "lora_alpha": float(row.method_detail["alpha"]),
            "target_modules": [
                name
                for target in row.method_detail["target_modules"]
                for name in TORCHTUNE_NAMES.get(target, (target,))
            ],
            "adapter_dtype": "base",
        }
    if row.method == "qlora":
        document["quantization"] = {"name": "nf4", "prepare_kbit": False}
    return document


def _names(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


RULES: Final[dict[str, Callable[[Row], dict[str, Any]]]] = {
    "fms-main": _fms,
    "ms-swift": _swift,
    "litgpt-resource-tables": _litgpt,
    "usamec": _lowmem,
    "lomo-paper": _lomo,
    "torchtune-docs-tutorials": _torchtune,
    "torchtune-readme-llama2-2024": _torchtune,
    "torchao-docs": _torchtune,
}
