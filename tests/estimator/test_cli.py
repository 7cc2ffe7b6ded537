"""The command line: what it asks the core, what it prints where, and what it returns."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from estimator import commands, engines, nvml, plugins, service
from estimator.catalog import Access
from estimator.errors import (
    MissingDependencyError,
    NoDriverError,
    UnsupportedModelError,
)
from estimator.render.document import to_dict

MODEL = ("--model", "meta-llama/Llama-3.1-8B")
LIVE_4090 = nvml.LiveGpu(
    name="NVIDIA GeForce RTX 4090",
    total_bytes=25_757_220_864,
    free_bytes=24_683_479_040,
    used_by_others_bytes=1_073_741_824,
    driver="570.86",
)


@pytest.fixture
def asked(monkeypatch, result):
    """Answer every request with the hand-made result, and keep what was asked."""
    calls = []

    def estimate(request, *, access):
        calls.append(SimpleNamespace(request=request, access=access))
        return result

    monkeypatch.setattr(service, "estimate", estimate)
    return calls


@pytest.fixture
def answered(monkeypatch, result):
    """Return a function that sets the verdict of the next answer."""

    def set_verdict(verdict):
        answer = replace(result, verdict=verdict)
        monkeypatch.setattr(service, "estimate", lambda request, *, access: answer)

    return set_verdict


def test_the_answer_goes_to_standard_output_and_nothing_else_does(asked, capsys, result):
    assert commands.run([*MODEL, "--gpu", "rtx-4090"]) == commands.EXIT_DOES_NOT_FIT
    out, err = capsys.readouterr()
    assert out.startswith(result.message)
    assert err == ""


def test_json_is_the_result_document(asked, capsys, result):
    commands.run([*MODEL, "--json"])
    assert json.loads(capsys.readouterr().out) == to_dict(result)


def test_quiet_is_one_line(asked, capsys, result):
    commands.run([*MODEL, "--quiet"])
    assert capsys.readouterr().out == f"{result.message}\n"


def test_explain_adds_the_derivation(asked, capsys):
    commands.run([*MODEL, "--explain"])
    assert "formula  32 x 117440512 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "arguments", "code"),
    [
        ("fits", ["--gpu", "a40"], 0),
        ("does_not_fit", ["--gpu", "a40"], 1),
        ("tight", ["--gpu", "a40"], 0),
        ("tight", ["--gpu", "a40", "--fail-on", "tight"], 4),
        ("fits", ["--gpu", "a40", "--fail-on", "tight"], 0),
        ("does_not_fit", ["--gpu", "a40", "--fail-on", "tight"], 1),
        # No card was named: the question was how much, and it was answered.
        ("unknown", [], 0),
        # A card was named and could not be judged: that is no answer, and never a "fits".
        ("unknown", ["--gpu", "a40"], 3),
        ("unknown", ["--memory", "24GiB"], 3),
    ],
)
def test_the_exit_code_says_the_verdict(answered, capsys, verdict, arguments, code):
    answered(verdict)
    assert commands.run([*MODEL, *arguments]) == code


def test_flags_become_the_request(asked):
    commands.run(
        [*MODEL, "--method", "qlora", "--lora-r", "8", "--seq-len", "4096", "--gpu", "a40"]
    )
    (call,) = asked
    assert (call.request.method.name, call.request.method.r) == ("lora", 8)
    assert call.request.quantization.name == "nf4"
    assert call.request.seq_len == 4096
    assert call.request.hardware.gpu == "a40"


@pytest.mark.parametrize(("flags", "access"), [([], Access.HUB), (["--offline"], Access.LOCAL)])
def test_offline_forbids_the_hub(asked, flags, access):
    commands.run([*MODEL, *flags])
    assert asked[0].access is access


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.json", '{"model": "gpt2", "seq_len": 512}'),
        ("r.yaml", "model: gpt2\nseq_len: 512\n"),
        ("request", '{"model": "gpt2", "seq_len": 512}'),
        ("request", "model: gpt2\nseq_len: 512\n"),
        ("bom.json", '\ufeff{"model": "gpt2", "seq_len": 512}'),
    ],
)
def test_a_request_file_is_json_or_yaml_and_flags_override_it(asked, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    commands.run(["--request", str(tmp_path / name)])
    commands.run(["--request", str(tmp_path / name), "--seq-len", "64", *MODEL])
    assert (asked[0].request.model, asked[0].request.seq_len) == ("gpt2", 512)
    assert (asked[1].request.model, asked[1].request.seq_len) == (MODEL[1], 64)


def test_a_dash_reads_standard_input(asked, monkeypatch):
    stream = SimpleNamespace(buffer=io.BytesIO(b'{"model": "gpt2", "padding": true}'))
    monkeypatch.setattr(sys, "stdin", stream)
    commands.run(["--request", "-"])
    assert asked[0].request.padding


def test_a_refusal_names_the_flag_that_was_typed(asked, capsys):
    assert commands.run([*MODEL, "--micro-batch-size", "0"]) == commands.EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: --micro-batch-size: ")
    assert not asked


def test_gpu_auto_is_the_card_of_this_machine_with_what_others_hold(asked, monkeypatch, capsys):
    monkeypatch.setattr(nvml, "probe", lambda: LIVE_4090)
    commands.run([*MODEL, "--gpu", "auto"])
    hardware = asked[0].request.hardware
    assert (hardware.gpu, hardware.memory_bytes) == ("rtx-4090", None)
    assert hardware.reserved_by_others_bytes == 1_073_741_824
    assert capsys.readouterr().err.startswith("note: NVIDIA GeForce RTX 4090: ")


def test_a_typed_figure_wins_over_what_the_driver_says(asked, monkeypatch):
    monkeypatch.setattr(nvml, "probe", lambda: LIVE_4090)
    commands.run([*MODEL, "--gpu", "auto", "--reserved-by-others", "0", "--memory", "20GiB"])
    hardware = asked[0].request.hardware
    assert hardware.reserved_by_others_bytes == 0
    assert hardware.memory_bytes == 20 * 2**30


def test_a_card_that_the_catalogue_does_not_know_brings_its_own_memory(asked, monkeypatch):
    unknown = replace(LIVE_4090, name="NVIDIA Prototype 77")
    monkeypatch.setattr(nvml, "probe", lambda: unknown)
    commands.run([*MODEL, "--gpu", "auto"])
    hardware = asked[0].request.hardware
    assert (hardware.gpu, hardware.memory_bytes) == ("NVIDIA Prototype 77", 25_757_220_864)


def test_gpu_auto_without_a_driver_is_one_friendly_line(asked, monkeypatch, capsys):
    def probe():
        raise NoDriverError("no NVIDIA driver answered")

    monkeypatch.setattr(nvml, "probe", probe)
    assert commands.run([*MODEL, "--gpu", "auto"]) == commands.EXIT_USAGE
    assert capsys.readouterr().err == "error: no NVIDIA driver answered\n"


def test_another_engine_gets_the_request_and_the_configuration(monkeypatch, capsys, result):
    def dry_run(request, config):
        assert config["hidden_size"] == 4096
        return replace(result, engine="dry-run")

    monkeypatch.setattr(engines, "load_plugin", lambda group, name: dry_run)
    commands.run([*MODEL, "--engine", "dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["engine"] == "dry-run"


def test_auto_falls_back_to_the_dry_run_and_says_so(monkeypatch, capsys, result):
    def refuse(request, *, access):
        raise UnsupportedModelError("model_type 'new' is not known")

    monkeypatch.setattr(service, "estimate", refuse)
    monkeypatch.setattr(engines, "load_plugin", lambda group, name: lambda *_: result)
    commands.run([*MODEL, "--engine", "auto", "--json"])
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert "model_type 'new' is not known" in notes[0]
    assert "dry run" in notes[0]


def test_auto_does_not_run_the_dry_run_where_the_analytic_engine_answers(asked, monkeypatch):
    monkeypatch.setattr(engines, "load_plugin", lambda *_: pytest.fail("it was asked"))
    commands.run([*MODEL, "--engine", "auto"])
    assert len(asked) == 1


@pytest.mark.parametrize("engine", ["auto", "dry-run"])
def test_a_dry_run_without_torch_is_refused_with_the_command_that_installs_it(
    monkeypatch, capsys, engine
):
    def refuse(request, *, access):
        raise UnsupportedModelError("model_type 'new' is not known")

    def dry_run(request, config):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(service, "estimate", refuse)
    monkeypatch.setattr(engines, "load_plugin", lambda group, name: dry_run)
    assert commands.run([*MODEL, "--engine", engine]) == commands.EXIT_CANNOT_ESTIMATE
    assert "pip install 'vramplan[profiler]'" in capsys.readouterr().err


def test_a_subcommand_whose_extra_is_missing_says_how_to_install_it(monkeypatch, capsys):
    def load(group, name):
        missing = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        raise plugins.missing_dependency(missing, name)

    monkeypatch.setattr(commands, "load_plugin", load)
    assert commands.run(["serve", "--port", "80"]) == commands.EXIT_CANNOT_ESTIMATE
    assert capsys.readouterr().err == (
        "error: serve needs 'fastapi', which is not installed: pip install 'vramplan[web]'\n"
    )


def test_the_help_lists_a_subcommand_whose_extra_is_missing(monkeypatch, capsys):
    def load(group, name):
        raise MissingDependencyError("serve needs 'fastapi'")

    monkeypatch.setattr(commands, "load_plugin", load)
    assert commands.run(["--help"]) == 0
    assert "serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch", "profiler"),
        ("transformers", "profiler"),
        ("fastapi", "web"),
        ("prometheus_client", "web"),
        ("huggingface_hub", "hub"),
    ],
)
def test_the_extra_of_a_missing_module_is_read_from_the_package(module, extra):
    missing = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert f"'vramplan[{extra}]'" in str(plugins.missing_dependency(missing, "this"))


def test_models_are_listed_by_a_part_of_their_name(capsys):
    assert commands.run(["models", "llama-3.1-8b", "--json"]) == 0
    ids = [model["id"] for model in json.loads(capsys.readouterr().out)]
    assert "meta-llama/Llama-3.1-8B" in ids
    assert all("llama-3.1-8b" in name.lower() for name in ids)


def test_gpus_are_listed_by_a_pattern(capsys):
    assert commands.run(["gpus", "rtx-40*", "--json"]) == 0
    keys = [gpu["key"] for gpu in json.loads(capsys.readouterr().out)]
    assert "rtx-4090" in keys
    assert all(key.startswith("rtx-40") for key in keys)


def test_a_list_of_nothing_says_so_on_standard_error(capsys):
    assert commands.run(["gpus", "no-such-card", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert err.startswith("note: ")


def test_the_version_is_printed(capsys):
    assert commands.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vramplan 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model: --model ID"),
        (["--seq-len", "8"], "name a model: --model ID"),
        (["gpt2"], "a model is named with --model"),
        ([*MODEL, "gpus"], "write --model after `gpus`"),
        ([*MODEL, "--quiet", "--json"], "--quiet prints one line"),
        ([*MODEL, "--engine", "guess"], "unknown engine 'guess'; known: analytic, auto"),
        ([*MODEL, "--modle", "x"], "No such option"),
        ([*MODEL, "--precision", "int4"], "'int4' is not one of"),
        ([*MODEL, "--precision", "bfloat16"], "Did you mean 'bf16'?"),
        ([*MODEL, "--method", "lorra"], "Did you mean 'lora'?"),
        (["modls"], "did you mean 'models'?"),
        (["-model", "gpt2"], "Long options begin with two dashes: --model"),
        ([*MODEL, "--memory", "24"], "24 is 24 bytes; write a unit, such as 24GiB"),
        ([*MODEL, "--confidence", "95"], "0.95 stands for 95 %"),
        ([*MODEL, "--lora-r", "8"], "--lora-r needs --method lora, loha, lokr"),
        ([*MODEL, "--memory", "many"], "cannot read 'many' as a size"),
        ([*MODEL, "--memory", "9" * 400 + "GiB"], "--memory"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_two(asked, capsys, arguments, said):
    assert commands.run(arguments) == commands.EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupt(request, *, access):
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "estimate", interrupt)
    assert commands.run([*MODEL]) == commands.EXIT_INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["NO_COLOR", "none"])
def test_colour_is_for_terminals_that_want_it(monkeypatch, variable):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "1")
    terminal = SimpleNamespace(isatty=lambda: True, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert commands.terminal_page(no_color=False).colour is (variable == "none")
    assert commands.terminal_page(no_color=True).colour is False


def test_a_narrow_encoding_gets_a_plain_page(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False, encoding="ascii"))
    assert commands.terminal_page(no_color=False).unicode is False
