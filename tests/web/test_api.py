"""The JSON API: what it answers, and the headers that go with it."""

import json

import pytest

from estimator.catalog import gpus, models
from estimator.errors import UnknownModelError
from web.settings import Settings

RUN = {"model": "llama-3.1-8b", "method": "qlora", "hardware": {"gpu": "rtx-4090"}}


def test_an_estimate_is_the_result_document(client):
    response = client.post("/v1/estimate", json={"model": "llama-3.1-8b"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document["schema"] == "estimate/v1"
    assert document["model"] == "meta-llama/Llama-3.1-8B"
    # Printed by transformers' num_parameters() for this model.
    assert document["parameters"]["total"] == 8_030_261_248


def test_a_run_that_does_not_fit_is_an_answer_and_not_an_error(client):
    run = {"model": "llama-3.1-8b", "hardware": {"memory_bytes": 1}}
    response = client.post("/v1/estimate", json=run)
    assert response.status_code == 200
    assert response.json()["verdict"] == "does_not_fit"


def test_the_same_body_gets_the_same_bytes_and_the_same_strong_etag(client):
    first, second = (client.post("/v1/estimate", json=RUN) for _ in range(2))
    assert first.content == second.content
    assert first.headers["etag"] == second.headers["etag"]
    assert not first.headers["etag"].startswith("W/")
    other = client.post("/v1/estimate", json={**RUN, "seq_len": 4096})
    assert other.headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON; Charset=UTF-8", 'application/json;charset="utf-8"'],
)
def test_json_may_say_its_charset(client, kind):
    response = client.post("/v1/estimate", content=json.dumps(RUN), headers={"Content-Type": kind})
    assert response.status_code == 200


def test_a_model_may_be_given_by_its_configuration(client):
    config = dict(next(model for model in models() if "TinyLlama-1.1B-Chat" in model.id).config)
    response = client.post("/v1/estimate", json={"model": {"config": config}})
    assert response.status_code == 200
    # Printed on the model's card: 1.1 B; counted by transformers to the unit.
    assert response.json()["parameters"]["total"] == 1_100_048_384


def test_models_are_searched_by_the_words_of_their_names(client):
    found = client.get("/v1/models", params={"q": "LLAMA 3.1 8b"}).json()
    assert "meta-llama/Llama-3.1-8B" in [model["id"] for model in found["models"]]
    assert all("3.1" in json.dumps(model) for model in found["models"])


def test_a_limit_shortens_the_list_and_not_the_total(client):
    found = client.get("/v1/models", params={"limit": 3}).json()
    assert len(found["models"]) == 3
    assert found["total"] == len(models())


def test_every_gpu_is_listed_with_what_its_driver_offers(client):
    found = client.get("/v1/gpus").json()
    assert found["total"] == len(gpus()) == len(found["gpus"])
    by_key = {gpu["key"]: gpu for gpu in found["gpus"]}
    # torch.cuda.get_device_properties(0).total_memory of an RTX 4090, as users print it.
    assert by_key["rtx-4090"]["usable_bytes"] < 24 * 2**30 == by_key["rtx-4090"]["nominal_bytes"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/gpus", "/v1/version"])
def test_a_list_that_the_client_has_is_not_sent_again(client, path):
    first = client.get(path)
    assert "max-age" in first.headers["cache-control"]
    again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1/gpus", "/nothing"])
def test_head_answers_as_get_does_without_the_body(client, path):
    get, head = client.get(path), client.head(path)
    assert head.content == b""
    assert head.status_code == get.status_code
    assert head.headers == get.headers


def test_the_server_says_that_it_is_alive_and_ready(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_a_server_without_its_catalogue_is_not_ready(client, monkeypatch):
    def missing():
        raise OSError("no such file")

    monkeypatch.setattr("web.api.models", missing)
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["type"] == "/problems/not-ready"


def test_metrics_count_verdicts_and_refusals_and_name_no_model(client):
    client.post("/v1/estimate", json=RUN)
    client.post("/v1/estimate", json={"model": "somebody/secret-model"})
    client.get("/somebody/secret-path")
    text = client.get("/metrics").text
    assert 'vramplan_verdicts_total{door="api",verdict=' in text
    assert 'vramplan_refusals_total{door="api",reason="unknown-model"} 1.0' in text
    assert 'route="unmatched"' in text
    assert 'route="/v1/estimate"' in text
    assert "secret" not in text
    assert "llama" not in text.lower()


@pytest.mark.parametrize("path", ["/", "/v1/gpus", "/nothing", "/docs", "/static/page.js"])
def test_every_response_carries_the_security_headers(client, path):
    headers = client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert "camera=()" in headers["permissions-policy"]
    assert "access-control-allow-origin" not in headers


def test_only_the_catalogue_is_open_to_http(client, monkeypatch):
    seen = []

    def refuse(request, *, access):
        seen.append(access.name)
        raise UnknownModelError("not here")

    monkeypatch.setattr("web.door.estimate", refuse)
    client.post("/v1/estimate", json=RUN)
    client.get("/answer", params={"model": "gpt2"})
    assert seen == ["CATALOGUE", "CATALOGUE"]


def test_the_cap_on_bodies_is_the_operators_to_set():
    assert Settings().max_body_bytes == 256 * 1024


@pytest.mark.parametrize("path", ["/docs", "/problems/unknown-model"])
def test_the_documentation_is_ours_and_loads_nothing_from_elsewhere(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "<script" not in response.text
