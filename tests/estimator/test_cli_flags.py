"""The flags: one for each field of the request, and what they do to a request document."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import click
import pytest
from msgspec import structs

from estimator.flags import FLAGS, given_flags, overlay, parse_flagged, request_options
from estimator.request import (
    FP8_LIBRARIES,
    METHOD_ALIASES,
    METHODS,
    QUANTIZATIONS,
    EstimateRequest,
    InlineModel,
    Section,
    known_fields,
)


def _models_in(annotation: Any) -> set[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation} - {InlineModel}
    return set().union(*map(_models_in, get_args(annotation))) if get_args(annotation) else set()


def _leaf_pointers(section: type[Section], prefix: str = "") -> set[str]:
    found = {f"{prefix}/name"} if section.__struct_config__.tag else set()
    for info in structs.fields(section):
        name, inner = info.name, _models_in(info.type)
        below = (_leaf_pointers(kind, f"{prefix}/{name}") for kind in inner)
        found |= set().union(*below) if inner else {f"{prefix}/{name}"}
    return found


def _parse(*arguments: str) -> dict[str, Any]:
    command = click.Command("test", params=list(request_options()))
    return given_flags(command.make_context("test", list(arguments)))


def test_every_field_of_the_request_has_exactly_one_flag():
    pointers = [flag.pointer for flag in FLAGS]
    assert sorted(pointers) == sorted(_leaf_pointers(EstimateRequest))
    assert {part for pointer in pointers for part in pointer.split("/") if part} == known_fields()


def test_the_choices_of_a_flag_are_those_of_its_field():
    options = {option.name: option for option in request_options()}
    task = get_args(get_type_hints(EstimateRequest)["task"])
    assert tuple(options["task"].type.choices) == task
    methods = (*(str(kind.__struct_config__.tag) for kind in METHODS), *METHOD_ALIASES)
    assert tuple(options["method"].type.choices) == methods


def test_every_flag_has_help_and_all_but_the_model_say_their_default():
    for option in request_options():
        assert option.help, option.name
        assert ("[default: " in option.help) == (option.name != "model"), option.name


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("seq_len", "2048"),
        ("method", "full"),
        ("lora_r", "16"),
        ("quantization", "none"),
        ("double_quant", "yes"),
        ("strategy", "none"),
        ("offload_params", "no"),
        ("target_modules", "all-linear"),
    ],
)
def test_the_default_in_the_help_is_that_of_the_request(option, default):
    (found,) = (each for each in request_options() if each.name == option)
    assert found.help.endswith(f"[default: {default}]")


@pytest.mark.parametrize(
    ("arguments", "document"),
    [
        (["--micro-batch-size", "4"], {"micro_batch_size": 4}),
        (["--padding"], {"padding": True}),
        (["--no-set-to-none"], {"loop": {"set_to_none": False}}),
        (["--autocast", "none"], {"autocast": None}),
        (["--precision", "AMP_BF16"], {"precision": "amp_bf16"}),
        (["--gpu", "rtx-4090"], {"hardware": {"gpu": "rtx-4090"}}),
        (["--memory", "24GiB"], {"hardware": {"memory_bytes": 25_769_803_776}}),
        (["--kernels", "liger, compile"], {"kernels": ["liger", "compile"]}),
        (["--offload-params"], {"parallelism": {"cpu_offload": {"params": True}}}),
        (["--zero-stage", "3"], {"parallelism": {"zero_stage": 3}}),
        (["--method", "lora", "--lora-r", "8"], {"method": {"name": "lora", "r": 8}}),
        (
            ["--method", "lora", "--target-modules", "q_proj,v_proj"],
            {"method": {"name": "lora", "target_modules": ["q_proj", "v_proj"]}},
        ),
        (
            ["--method", "lora", "--target-modules", "all-linear"],
            {"method": {"name": "lora", "target_modules": "all-linear"}},
        ),
        (
            ["--method", "qlora", "--no-double-quant"],
            {"method": {"name": "lora"}, "quantization": {"name": "nf4", "double_quant": False}},
        ),
        (
            ["--method", "rslora"],
            {"method": {"name": "lora", "use_rslora": True}},
        ),
        (
            ["--method", "lora", "--method-layers-to-transform", "0,2"],
            {"method": {"name": "lora", "layers_to_transform": [0, 2]}},
        ),
        (
            ["--method", "lora", "--method-rank-pattern", '{"q_proj": 8}'],
            {"method": {"name": "lora", "rank_pattern": {"q_proj": 8}}},
        ),
        (
            ["--method", "lora", "--method-init-lora-weights", "false"],
            {"method": {"name": "lora", "init_lora_weights": False}},
        ),
        (
            ["--optimizer", "adamw_torch_fused"],
            {"optimizer": {"name": "adamw", "implementation": "fused"}},
        ),
        (
            ["--lora-alpha", "32", "--method", "lora"],
            {"method": {"name": "lora", "lora_alpha": 32}},
        ),
    ],
)
def test_a_flag_sets_its_field(arguments, document):
    given = _parse(*arguments)
    assert overlay({"model": "gpt2"}, given) == {"model": "gpt2", **document}
    parse_flagged(overlay({"model": "gpt2"}, given), given)


def _value_typed_for(option: click.Option) -> Any:
    if option.is_flag:
        return True
    kind = getattr(option.type, "inner", option.type)
    if isinstance(kind, click.Choice):
        return kind.choices[-1]
    # The longest of some samples is as long as `seq_len` is by default.
    typed = {"float": "0.5", "json": '{"q_proj": 8}', "size": "1GiB", "numbers": "2048"}
    text = typed.get(kind.name, "1")
    return kind.convert(text, option, click.Context(click.Command("test")))


@pytest.mark.parametrize(("flag", "option"), list(zip(FLAGS, request_options(), strict=True)))
def test_every_flag_gives_a_value_that_the_request_accepts(flag, option):
    _, _, field = flag.pointer.rpartition("/")
    methods = (kind().name for kind in METHODS if field in kind.__struct_fields__)
    method = next(methods, "lora") if flag.pointer.startswith("/method/") else "lora"
    formats = (kind().name for kind in QUANTIZATIONS if field in kind.__struct_fields__)
    quantization = next(formats, "nf4") if flag.pointer.startswith("/quantization/") else "nf4"
    chosen = {"/model": "gpt2", "/method/name": method, "/quantization/name": quantization}
    if flag.pointer.startswith("/fp8/"):
        libraries = (kind().name for kind in FP8_LIBRARIES if field in kind.__struct_fields__)
        chosen["/fp8/name"] = next(libraries, "torchao")
    if flag.pointer.startswith("/qat/"):
        chosen["/qat/name"] = "torchao"
    parse_flagged(overlay({}, {**chosen, flag.pointer: _value_typed_for(option)}), ())


@pytest.mark.parametrize(
    ("document", "arguments", "expected"),
    [
        # The file's other fields of the same kind stay.
        (
            {"method": {"name": "lora", "r": 64}},
            ["--method", "qlora"],
            {"method": {"name": "lora", "r": 64}, "quantization": {"name": "nf4"}},
        ),
        # What the file's own word `qlora` would have added goes with the word.
        ({"method": "qlora"}, ["--method", "lora"], {"method": {"name": "lora"}}),
        # Another kind starts anew: r and momentum mean nothing there.
        ({"method": {"name": "lora", "r": 64}}, ["--method", "full"], {"method": {"name": "full"}}),
        (
            {"optimizer": {"name": "sgd", "momentum": 0.9}},
            ["--optimizer", "adamw"],
            {"optimizer": {"name": "adamw"}},
        ),
        (
            {"optimizer": {"name": "adamw", "implementation": "foreach"}},
            ["--optimizer", "adamw_torch_fused"],
            {"optimizer": {"name": "adamw", "implementation": "fused"}},
        ),
        ({"quantization": "nf4"}, ["--quantization", "none"], {"quantization": None}),
        ({"method": "lora"}, ["--lora-r", "8"], {"method": {"name": "lora", "r": 8}}),
        ({"hardware": "a40"}, ["--num-gpus", "2"], {"hardware": {"gpu": "a40", "num_gpus": 2}}),
        ({"autocast": "bf16"}, ["--autocast", "none"], {"autocast": None}),
    ],
)
def test_flags_win_over_the_file(document, arguments, expected):
    assert overlay(document, _parse(*arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--lora-r", "8"], "--lora-r needs --method lora"),
        (["--method", "full", "--lora-r", "8"], "--lora-r needs --method lora"),
        (["--double-quant"], "--double-quant needs --quantization nf4"),
    ],
)
def test_a_flag_of_a_kind_that_was_not_chosen_is_refused(arguments, needed):
    with pytest.raises(click.UsageError, match=needed):
        overlay({"model": "gpt2"}, _parse(*arguments))


def test_what_was_not_typed_is_not_in_the_document():
    assert _parse() == {}
