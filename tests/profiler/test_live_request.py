"""The request document of a live run says what the run is, or names what it cannot say."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from estimator.errors import UnsupportedCombinationError
from estimator.request import parse_request
from estimator.service import estimate
from profiler.live import batch, loop, optimizer, weights
from profiler.live.findings import Findings
from profiler.live.request import LiveRun, document
from tests.profiler import live_runs

# The stack's warnings are about code that is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def _arguments(tmp_path: Any, **changes: Any) -> Any:
    from transformers import TrainingArguments

    given = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "report_to": []}
    return TrainingArguments(**{**given, **changes})


def _document(tmp_path: Any, model: Any, findings: Findings | None = None, **changes: Any) -> Any:
    import torch

    args = _arguments(tmp_path, **changes)
    step = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    data = SimpleNamespace(dataset=live_runs.samples(16, 16), collate_fn=None)
    run = LiveRun(args, model, step, data, None, args.per_device_train_batch_size)
    return document(run, findings or Findings())


def _peft(kind: str, **knobs: Any) -> Any:
    import peft

    return getattr(peft, kind)(task_type="CAUSAL_LM", **knobs)


# PEFT's configuration, and what the request calls it.
METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "LoraConfig",
        {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
        {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
         "target_modules": "all-linear"},
    ),
    (
        "LoraConfig",
        {"r": 4, "bias": "all", "modules_to_save": ["lm_head"], "use_rslora": True},
        {"name": "lora", "r": 4, "lora_alpha": 8, "bias": "all", "modules_to_save": ["lm_head"],
         "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    ),
    (
        "LoraConfig",
        {"r": 4, "target_modules": r".*layers\.[01]\..*q_proj"},
        {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": [
            "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]},
    ),
    (
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": [
            "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
    ),
    (
        "LoraConfig",
        {"r": 4, "use_dora": True, "rank_pattern": {"q_proj": 2}, "init_lora_weights": "gaussian"},
        {"name": "lora", "r": 4, "lora_alpha": 8, "use_dora": True, "rank_pattern": {"q_proj": 2},
         "init_lora_weights": "gaussian", "target_modules": ["q_proj", "v_proj"]},
    ),
    (
        "LoraConfig",
        {"r": 4, "trainable_token_indices": {"embed_tokens": [1, 2]}, "target_modules": ["q_proj"]},
        {"name": "lora", "r": 4, "lora_alpha": 8, "trainable_token_indices": [1, 2],
         "target_modules": ["q_proj"]},
    ),
    (
        "LoraConfig",
        {"r": 4, "target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
        {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": [],
         "target_parameters": ["self_attn.q_proj.weight"]},
    ),
    ("IA3Config", {}, {"name": "ia3", "target_modules": ["down_proj", "k_proj", "v_proj"],
                       "feedforward_modules": ["down_proj"]}),
    ("LNTuningConfig", {}, {"name": "ln_tuning", "target_modules": [
        "input_layernorm", "norm", "post_attention_layernorm"]}),
    ("LoHaConfig", {"r": 4}, {"name": "loha", "r": 4, "target_modules": ["q_proj", "v_proj"]}),
    ("LoKrConfig", {"r": 4, "decompose_both": True},
     {"name": "lokr", "r": 4, "decompose_both": True, "target_modules": ["q_proj", "v_proj"]}),
    ("OFTConfig", {"oft_block_size": 8},
     {"name": "oft", "oft_block_size": 8, "target_modules": ["q_proj", "v_proj"]}),
    ("BOFTConfig", {"boft_block_size": 8},
     {"name": "boft", "boft_block_size": 8, "target_modules": ["q_proj", "v_proj"]}),
    ("FourierFTConfig", {"n_frequency": 10},
     {"name": "fourierft", "n_frequency": 10, "target_modules": ["q_proj", "v_proj"]}),
    ("VeraConfig", {"r": 4}, {"name": "vera", "r": 4, "target_modules": ["q_proj", "v_proj"]}),
    ("VBLoRAConfig", {"r": 2, "num_vectors": 16, "vector_length": 8},
     {"name": "vblora", "r": 2, "num_vectors": 16, "vector_length": 8,
      "target_modules": ["q_proj", "v_proj"]}),
    ("TrainableTokensConfig", {"token_indices": [1, 5]},
     {"name": "trainable_tokens", "num_tokens": 2}),
    ("PromptTuningConfig", {"num_virtual_tokens": 5},
     {"name": "prompt_tuning", "num_virtual_tokens": 5}),
    ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
     {"name": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    ("PrefixTuningConfig", {"num_virtual_tokens": 5},
     {"name": "prefix_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2},
     {"name": "adaption_prompt", "adapter_len": 4, "adapter_layers": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "knobs", "expected"), METHODS, ids=[f"{each[0]} {list(each[1])}" for each in METHODS]
)
def test_a_configuration_of_peft_becomes_the_method_that_counts_the_same(
    kind, knobs, expected, tmp_path
):
    import peft

    model = peft.get_peft_model(live_runs.llama(), _peft(kind, **knobs))
    found = _document(tmp_path, model)
    assert found["method"] == expected
    counted = estimate(found).parameters
    trainable, total = model.get_nb_trainable_parameters()
    assert (counted.total, counted.trainable) == (total, trainable)
    assert weights.parameters(model) == (total, trainable)


def test_adalora_over_bf16_weights_counts_the_same(tmp_path):
    """PEFT's move of the rank to the type of the weights makes a parameter of it, as on a GPU."""
    import peft
    import torch

    model = live_runs.llama(dtype=torch.bfloat16)
    model = peft.get_peft_model(model, _peft("AdaLoraConfig", init_r=6, target_r=3, total_step=9))
    found = _document(tmp_path, model)
    assert found["method"] == {
        "name": "adalora", "init_r": 6, "target_r": 3, "total_step": 9,
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    counted = estimate(found).parameters
    assert (counted.total, counted.trainable) == weights.parameters(model)


def test_the_document_of_lora_builds_the_very_parameters_of_the_live_model(tmp_path):
    import peft

    from profiler import workload

    live = peft.get_peft_model(
        live_runs.llama(), _peft("LoraConfig", r=4, modules_to_save=["lm_head"])
    )
    request = parse_request(_document(tmp_path, live))
    built = workload.meta_model(request, workload.model_config(request.model.config))

    def described(model: Any) -> dict[str, Any]:
        return {
            name: (each.shape, each.dtype, each.requires_grad)
            for name, each in model.named_parameters()
        }

    assert described(built) == described(live)


def test_every_field_of_a_plain_run_is_what_the_run_is(tmp_path):
    found = _document(
        tmp_path,
        live_runs.llama(),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        max_grad_norm=0.5,
        neftune_noise_alpha=5.0,
        label_smoothing_factor=0.1,
    )
    config = found.pop("model")["config"]
    assert {name: config[name] for name in live_runs.LLAMA} == live_runs.LLAMA
    assert "use_cache" not in config
    assert found == {
        "method": {"name": "full"},
        "precision": "fp32",
        "optimizer": {"name": "adamw", "implementation": "foreach"},
        "micro_batch_size": 3,
        "seq_len": 16,
        "gradient_accumulation_steps": 4,
        "padding": False,
        "packing": False,
        "activation_checkpointing": "none",
        "attention": "sdpa",
        "loss": "standard",
        "kernels": [],
        "loop": {
            "neftune_noise_alpha": 5.0,
            "label_smoothing_factor": 0.1,
            "max_grad_norm": 0.5,
            "use_cache": True,
        },
        "software": {"framework": "transformers", "version": "5"},
    }


def test_a_bf16_model_with_bf16_adapters_says_so(tmp_path):
    import peft
    import torch

    model = peft.get_peft_model(
        live_runs.llama(dtype=torch.bfloat16),
        _peft("LoraConfig", r=4),
        autocast_adapter_dtype=False,
    )
    found = _document(tmp_path, model)
    assert found["precision"] == "bf16"
    assert found["method"]["adapter_dtype"] == "base"


def test_four_bit_weights_are_read_off_their_layers(tmp_path):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    live_runs.llama(hidden_size=64).save_pretrained(tmp_path / "model")
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    bare = peft.get_peft_model(packed, _peft("LoraConfig", r=4, target_modules="all-linear"))
    section = {
        "name": "nf4", "double_quant": True, "compute_dtype": "bfloat16", "quant_storage": "uint8",
        "prepare_kbit": False,
    }  # fmt: skip
    found = _document(tmp_path, bare)
    assert (found["precision"], found["quantization"]) == ("bf16", section)
    assert found["method"]["target_modules"] == "all-linear"
    assert found["model"]["config"]["_name_or_path"] == "model"
    counted = estimate(found).parameters
    trainable, total = bare.get_nb_trainable_parameters()
    assert (counted.total, counted.trainable) == (total, trainable)

    # The preparation freezes everything, and is meant to come before the adapters.
    peft.prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert _document(tmp_path, bare)["quantization"]["prepare_kbit"] is True


def test_eight_bit_weights_are_read_off_their_layers(tmp_path):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    live_runs.llama(hidden_size=64).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=5.0,
            llm_int8_skip_modules=["q_proj", "lm_head"],
        ),
    )
    model = peft.get_peft_model(model, _peft("LoraConfig", r=4))
    assert _document(tmp_path, model)["quantization"] == {
        "name": "int8", "threshold": 5.0, "skip_modules": ["lm_head", "q_proj"],
        "prepare_kbit": False,
    }  # fmt: skip
    assert all(each is not None for each in weights.tensors(model))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({}, "full"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "full_reentrant"),
        ({"every_n_layers": 2}, "every_2"),
        ({"every_n_layers": 2, "offload": True}, "every_2_offload"),
    ],
)
def test_checkpointing_is_read_off_the_layers(settings, word, tmp_path):
    model = live_runs.llama()
    model.activation_checkpointing_enable(**settings)
    found = _document(tmp_path, model)
    assert found["activation_checkpointing"] == word
    assert "use_cache" not in found["loop"]


PARTIAL = {
    # The trained parameters, and what the request calls them.
    r"layers\.[12]\.|lm_head": {"last_layers": 2, "modules": ["lm_head"]},
    r"layers\.2\.": {"last_layers": 1},
    r"layers\.[12]\..*(q_proj|v_proj)": {"last_layers": 2, "modules": ["q_proj", "v_proj"]},
    r"q_proj": {"last_layers": 3, "modules": ["q_proj"]},
    r"norm": {"norms": True},
    r"embed_tokens|lm_head": {"modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("pattern", list(PARTIAL))
def test_a_model_that_is_frozen_in_part_is_told_by_what_it_trains(pattern, tmp_path):
    model = live_runs.llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
    found = _document(tmp_path, model)
    assert found["method"] == {"name": "partial", **PARTIAL[pattern]}
    counted = estimate(found).parameters
    assert (counted.total, counted.trainable) == weights.parameters(model)


def _frozen(model: Any) -> Any:
    """Freeze one layer in the middle, for which there is no word."""
    model.model.layers[1].requires_grad_(False)
    return model


def _mixed(model: Any) -> Any:
    import torch

    model.model.norm.to(torch.bfloat16)
    return model


def _patched(model: Any) -> Any:
    model.forward = lambda **inputs: None
    return model


def _checkpointed(model: Any) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": list})
    return model


def _adapted(**knobs: Any) -> Any:
    import peft

    return peft.get_peft_model(live_runs.llama(), _peft("LoraConfig", r=4, **knobs))


UNKNOWN = {
    "frozen without PEFT": lambda: _frozen(live_runs.llama()),
    "several types": lambda: _mixed(live_runs.llama()),
    "tests.profiler.test_live_request put in place": lambda: _patched(live_runs.llama()),
    "context_fn": lambda: _checkpointed(live_runs.llama()),
    "ensure_weight_tying": lambda: _adapted(ensure_weight_tying=True),
}


@pytest.mark.parametrize("named", list(UNKNOWN))
def test_what_the_document_cannot_say_is_named(named, tmp_path):
    with pytest.raises(UnsupportedCombinationError, match=named):
        _document(tmp_path, UNKNOWN[named]())


def test_everything_that_cannot_be_said_is_named_at_once(tmp_path):
    import peft

    model = peft.get_peft_model(_checkpointed(live_runs.llama()), _peft("HRAConfig"))
    with pytest.raises(UnsupportedCombinationError, match=r"context_fn; PEFT's HRAConfig"):
        _document(tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_gpu": 2}, "2 GPUs"),
        ({"world_size": 8}, "8 GPUs"),
        ({"fsdp": "full_shard"}, "FSDP"),
        ({"deepspeed": "zero3.json"}, "DeepSpeed"),
    ],
)
def test_more_than_one_gpu_is_named(changes, named):
    plain = {"parallel_mode": "x", "n_gpu": 1, "world_size": 1, "fsdp": "", "deepspeed": None}
    findings = Findings()
    loop.refuse_many_gpus(SimpleNamespace(**{**plain, **changes}), live_runs.llama(), findings)
    assert [named in each for each in findings.unknown] == [True]


def test_the_compiled_and_fused_kernels_have_their_words(tmp_path):
    args = _arguments(tmp_path, torch_compile_mode="max-autotune", torch_compile=True)
    stack = {"framework": "transformers", "version": "5"}
    assert loop.kernels_and_loss(args, stack, Findings()) == (
        ["compile_max_autotune"], "standard",
    )  # fmt: skip
    args.torch_compile = False
    args.use_liger_kernel = True
    assert loop.kernels_and_loss(args, stack, Findings()) == (["liger"], "fused_linear")
    args.liger_kernel_config = {"fused_linear_cross_entropy": False, "rope": True}
    findings = Findings()
    assert loop.kernels_and_loss(args, stack, findings) == (["liger"], "standard")
    assert findings.unknown == []
    args.liger_kernel_config = {"cross_entropy": True, "rope": False, "rms_norm": True}
    loop.kernels_and_loss(args, stack, findings)
    assert findings.unknown == ["liger_kernel_config with cross_entropy, rope"]


@pytest.mark.parametrize(
    ("framework", "installed", "known"),
    [
        ("transformers", "5.23.0", "5"),
        ("transformers", "4.49.0", "5"),
        ("transformers", "4.46.3", "4"),
        ("transformers", "4.31.0", "4.45"),
        ("trl", "1.16.0", "1.16"),
        ("trl", "1.6.0", None),
        ("trl", "1.4.2", "1.3"),
        ("trl", "0.26.0", None),
        ("trl", "0.24.0", "0.22"),
        ("trl", "0.9.6", None),
    ],
)
def test_an_installed_version_means_the_profile_that_was_read_at_its_tag(
    framework, installed, known
):
    assert loop.software_version(framework, installed) == known


def test_torchs_own_optimizer_is_read_off_the_object(tmp_path):
    import torch

    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    args, findings = _arguments(tmp_path), Findings()
    live = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    assert optimizer.optimizer(args, live, findings) == {
        "name": "sgd", "implementation": "single", "momentum": 0.9, "nesterov": True,
    }  # fmt: skip
    live = torch.optim.AdamW(parameters, fused=True)
    assert optimizer.optimizer(args, live, findings) == {
        "name": "adamw", "implementation": "fused",
    }  # fmt: skip
    assert findings == Findings()


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("AdamW8bit", {}, "adamw_8bit"),
        ("PagedAdamW32bit", {}, "paged_adamw_32bit"),
        ("PagedLion8bit", {}, "paged_lion_8bit"),
        ("AdEMAMix", {}, "ademamix"),
        ("RMSprop32bit", {}, "rmsprop_bnb_32bit"),
    ],
)
def test_an_optimizer_of_bitsandbytes_is_read_off_the_object(kind, settings, name, tmp_path):
    import bitsandbytes
    import torch

    live = getattr(bitsandbytes.optim, kind)([torch.nn.Parameter(torch.ones(2, 2))], **settings)
    found = optimizer.optimizer(_arguments(tmp_path), live, Findings())
    assert found == {"name": name}


def test_an_optimizer_of_the_arguments_keeps_its_knobs(tmp_path):
    from transformers import Adafactor

    model = live_runs.llama()
    args = _arguments(tmp_path, optim="apollo_adamw", optim_args="rank=4,scale_type=tensor,scale=2")
    findings = Findings()
    # What is built of the arguments is judged by its package alone.
    live = Adafactor(model.parameters(), relative_step=False, lr=1e-3)
    assert optimizer.optimizer(args, live, findings) == {
        "name": "apollo_adamw", "rank": 4, "scale_type": "tensor",
    }  # fmt: skip
    assert findings.unknown == []
    args.optim_args = "proj_type=left"
    optimizer.optimizer(args, live, findings)
    assert findings.unknown == ["proj_type=left of optim_args"]


def test_an_optimizer_of_the_users_own_is_named(tmp_path):
    import torch

    class Own(torch.optim.SGD):
        pass

    findings = Findings()
    live = Own([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.optimizer(_arguments(tmp_path), live, findings)
    assert findings.unknown == [f"the optimizer {__name__}.{Own.__qualname__}"]


def _batch(data: Any, *, given: int | None = None, findings: Findings | None = None, **args: Any):
    size = args.pop("size", 2)
    loader = SimpleNamespace(dataset=data, collate_fn=args.pop("collator", None))
    return batch.batch(
        SimpleNamespace(per_device_train_batch_size=size, **args),
        live_runs.llama(),
        args.pop("tokenizer", None),
        loader,
        given,
        findings or Findings(),
    )


def test_the_longest_sample_is_the_length_and_uneven_ones_are_padded():
    assert _batch(live_runs.samples(5, 9)) == (9, True, False)
    assert _batch(live_runs.samples(9, 9)) == (9, False, False)
    assert _batch(live_runs.samples(5, 9), size=1) == (9, False, False)
    collator = SimpleNamespace(pad_to_multiple_of=8)
    assert _batch(live_runs.samples(9, 9), collator=collator) == (16, True, False)


def test_a_table_of_arrow_is_measured_without_reading_it():
    from datasets import Dataset

    table = Dataset.from_dict({"input_ids": [[1] * each for each in (3, 7, 5)]})
    assert _batch(table) == (7, True, False)
    assert _batch(table.select([2, 0])) == (5, True, False)
    assert _batch(table.with_transform(dict)).seq_len == 128


def test_flattened_sequences_are_packed():
    from transformers import DataCollatorWithFlattening

    found = _batch(live_runs.samples(5, 9), collator=DataCollatorWithFlattening())
    assert found == (9, False, True)


def test_a_length_that_is_only_assumed_is_said():
    findings = Findings()
    assert _batch(iter(()), findings=findings) == (128, True, False)
    assert [each.split()[0] for each in findings.assumed] == ["seq_len", "samples"]
    assert "the model's longest context" in findings.assumed[0]
    findings = Findings()
    assert _batch(iter(()), findings=findings, max_length=64) == (64, True, False)
    assert "max_length 64" in findings.assumed[0]
    assert _batch(iter(()), given=32).seq_len == 32
