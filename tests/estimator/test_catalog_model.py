"""A model name means the same model through every door, and a miss says what to do."""

import json
from pathlib import Path

import pytest

from estimator.catalog import Access, find_model, models
from estimator.errors import (
    InvalidConfigError,
    InvalidRequestError,
    MalformedDocumentError,
    MissingDependencyError,
    ModelUnreachableError,
    UnknownModelError,
)

LLAMA = "meta-llama/Llama-3.1-8B"
TINY = {"model_type": "llama", "hidden_size": 64}


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def write_cached_config(cache: Path, folder: str, text: str, revision: str = "abc123") -> None:
    """Lay out one model as huggingface_hub does."""
    snapshot = cache / folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(text)
    refs = cache / folder / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)


def test_the_catalogue_holds_every_model_of_the_reference():
    assert len(models()) == 558
    assert sum(model.parameters.verified for model in models()) == 462


def test_every_model_id_and_alias_finds_its_own_model():
    for model in models():
        for name in (model.id, *model.aliases):
            assert find_model(name, Access.CATALOGUE).id == model.id


def test_every_config_says_its_family_and_every_entry_has_a_source():
    for model in models():
        assert model.config["model_type"] == model.family
        assert model.sources
        assert model.parameters.computed > 0


def test_a_licence_is_kept_only_where_a_file_was_opened():
    licences = [model.license for model in models() if model.license]
    assert len(licences) == 36
    assert all(licence.source == "kaito model_catalog.yaml" for licence in licences)


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("meta-llama/Llama-3.1-8B", LLAMA),
        ("META-LLAMA/llama-3.1-8b", LLAMA),
        ("meta-llama/Meta-Llama-3.1-8B", LLAMA),
        ("llama-3.1-8b", LLAMA),
        ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("gemma-2-9b", "google/gemma-2-9b"),
        ("gpt2", "openai-community/gpt2"),
        ("vicuna-7b", "lmsys/vicuna-7b-v1.5"),
    ],
)
def test_common_names_find_the_original_publisher_s_model(name, model_id):
    assert find_model(name, Access.CATALOGUE).id == model_id


# Shapes printed in the papers: Touvron 2023 (2307.09288), Grattafiori 2024 (2407.21783, table 3),
# Jiang 2023 (2310.06825, table 1), Radford 2019 (table 2).
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (LLAMA, {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}),
        (
            "meta-llama/Llama-3.1-405B",
            {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128},
        ),
        (
            "mistralai/Mistral-7B-v0.1",
            {"num_hidden_layers": 32, "intermediate_size": 14336, "num_key_value_heads": 8},
        ),
        ("openai-community/gpt2-xl", {"n_layer": 48, "n_embd": 1600}),
    ],
)
def test_shapes_are_those_of_the_papers(name, shape):
    config = find_model(name, Access.CATALOGUE).config
    aliases = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size"}
    found = {key: config.get(key, config.get(aliases.get(key, key))) for key in shape}
    assert found == shape


def test_a_catalogue_config_cannot_be_changed_by_its_reader():
    with pytest.raises(TypeError):
        find_model(LLAMA, Access.CATALOGUE).config["hidden_size"] = 1


def test_an_unknown_name_is_refused_with_the_closest_known_ones():
    with pytest.raises(UnknownModelError, match=LLAMA):
        find_model("meta-lama/Llama-3.1-8b", Access.CATALOGUE)


def test_a_copy_of_a_known_model_under_another_organisation_names_the_original_first():
    with pytest.raises(UnknownModelError, match=f"closest known: {LLAMA}"):
        find_model("unsloth/Llama-3.1-8B", Access.CATALOGUE)


@pytest.mark.parametrize(
    "name",
    ["../secrets", "a/b/c", "https://example.org/x", "name with spaces", "a/..", "", "é", "x\n"],
)
def test_what_is_not_a_model_id_is_never_looked_up(name):
    with pytest.raises(InvalidRequestError, match="not a model id"):
        find_model(name, Access.CATALOGUE)


def test_a_local_config_file_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    found = find_model(str(path), Access.LOCAL)
    assert dict(found.config) == TINY
    assert found.id == str(path)


def test_a_local_folder_with_a_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert dict(find_model(str(tmp_path), Access.LOCAL).config) == TINY


def test_a_local_folder_comes_before_the_catalogue(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert dict(find_model("gpt2", Access.LOCAL).config) == TINY


def test_a_folder_without_a_config_does_not_hide_the_catalogue(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("gpt2", Access.LOCAL).id == "openai-community/gpt2"


def test_the_catalogue_alone_never_reads_a_local_path(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert find_model("gpt2", Access.CATALOGUE).id == "openai-community/gpt2"
    with pytest.raises(InvalidRequestError):
        find_model(str(tmp_path / "gpt2" / "config.json"), Access.CATALOGUE)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UnknownModelError, match="No such file"):
        find_model(str(tmp_path / "config.json"), Access.LOCAL)


def test_a_path_longer_than_the_file_system_allows_is_refused_and_not_a_crash():
    with pytest.raises(InvalidRequestError):
        find_model("x" * 400, Access.LOCAL)


def test_a_corrupt_local_config_is_refused_with_its_place(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": ')
    with pytest.raises(MalformedDocumentError, match="line 1, column"):
        find_model(str(path), Access.LOCAL)


def test_a_config_in_the_hub_cache_on_disk_is_found_through_its_main_revision(tmp_path):
    cache = tmp_path / "hub-cache"
    write_cached_config(cache, "models--some-org--Some-Model", json.dumps(TINY))
    (cache / "models--some-org--Some-Model" / "snapshots" / "older").mkdir()
    found = find_model("some-org/Some-Model", Access.LOCAL)
    assert dict(found.config) == TINY
    assert found.origin == "local Hub cache"


def test_the_catalogue_alone_never_reads_the_hub_cache(tmp_path):
    write_cached_config(tmp_path / "hub-cache", "models--some-org--Some-Model", json.dumps(TINY))
    with pytest.raises(UnknownModelError):
        find_model("some-org/Some-Model", Access.CATALOGUE)


def test_a_cached_file_that_is_not_a_config_is_refused(tmp_path):
    write_cached_config(tmp_path / "hub-cache", "models--some-org--Some-Model", "[1, 2]")
    with pytest.raises(InvalidConfigError, match="array"):
        find_model("some-org/Some-Model", Access.LOCAL)


def test_without_the_network_a_miss_says_how_to_go_on():
    with pytest.raises(UnknownModelError, match=r"--model path/to/config\.json"):
        find_model("some-org/Some-Model", Access.LOCAL)


def test_the_hub_is_asked_last_and_only_when_it_is_allowed(monkeypatch):
    asked = []

    def fetch(model_id):
        asked.append(model_id)
        return dict(TINY)

    monkeypatch.setattr("estimator.catalog.model.fetch_config", fetch)
    assert find_model(LLAMA, Access.HUB).origin == "catalogue"
    with pytest.raises(UnknownModelError):
        find_model("some-org/Some-Model", Access.LOCAL)
    assert asked == []
    assert find_model("some-org/Some-Model", Access.HUB).origin == "Hugging Face Hub"
    assert asked == ["some-org/Some-Model"]


@pytest.mark.parametrize(
    ("raised", "expected", "advice"),
    [
        (MissingDependencyError("pip install 'vramplan[hub]'"), UnknownModelError, "vramplan"),
        (UnknownModelError("the Hub has no such model"), UnknownModelError, "closest known"),
        (ModelUnreachableError("is gated; set HF_TOKEN"), ModelUnreachableError, "HF_TOKEN"),
    ],
)
def test_a_refusal_of_the_hub_still_names_the_closest_models(monkeypatch, raised, expected, advice):
    def fetch(model_id):
        raise raised

    monkeypatch.setattr("estimator.catalog.model.fetch_config", fetch)
    with pytest.raises(expected, match=LLAMA) as refusal:
        find_model("meta-lama/Llama-3.1-8B", Access.HUB)
    assert advice in str(refusal.value)
