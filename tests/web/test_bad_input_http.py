"""What a careless or hostile client sends, and the problem document that it gets for it."""

import json

import httpx2
import pytest

MODEL = "HuggingFaceTB/SmolLM2-135M"
# What no answer may show: traces of the server's own code or files.
LEAKS = ("Traceback", 'File "', "/estimator/", "site-packages")


def request(**fields):
    return json.dumps({"model": MODEL, **fields}).encode()


def config(**fields):
    base = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
    }
    kept = {name: value for name, value in {**base, **fields}.items() if value is not None}
    return json.dumps({"model": {"config": kept}}).encode()


# (what is sent, status, slug, JSON pointer of an error or None)
BODIES = {
    "unknown model": (b'{"model": "no-such/model"}', 404, "unknown-model", None),
    "unknown gpu": (request(hardware={"gpu": "rtx-9999"}), 422, "unknown-gpu", None),
    "gpu of this machine": (
        request(hardware={"gpu": "Auto"}), 422, "invalid-request", "/hardware/gpu",
    ),
    "gpu of this machine, in short": (
        request(hardware="auto"), 422, "invalid-request", "/hardware/gpu",
    ),
    "unknown field": (request(sequence_len=1), 422, "invalid-request", "/sequence_len"),
    "unknown nested field": (
        request(hardware={"gpus": 1}), 422, "invalid-request", "/hardware/gpus",
    ),
    "field with a slash in its name": (
        b'{"model": "gpt2", "a/b": 1}', 422, "invalid-request", "/a~1b",
    ),
    "no model": (b"{}", 422, "invalid-request", "/model"),
    "model is a number": (b'{"model": 7}', 422, "invalid-request", "/model"),
    "model is null": (b'{"model": null}', 422, "invalid-request", "/model"),
    "model is empty": (b'{"model": ""}', 422, "invalid-request", "/model"),
    "negative batch": (request(micro_batch_size=-1), 422, "invalid-request", "/micro_batch_size"),
    "batch of none": (request(micro_batch_size=0), 422, "invalid-request", "/micro_batch_size"),
    "absurd batch": (
        request(micro_batch_size=10**12), 422, "invalid-request", "/micro_batch_size",
    ),
    "number as string": (request(seq_len="2048"), 422, "invalid-request", "/seq_len"),
    "fraction of a token": (request(seq_len=1.5), 422, "invalid-request", "/seq_len"),
    "boolean as number": (request(padding=1), 422, "invalid-request", "/padding"),
    "NaN": (b'{"model": "gpt2", "seq_len": NaN}', 400, "malformed-document", None),
    "infinity": (b'{"model": "gpt2", "confidence": 1e999}', 400, "malformed-document", None),
    "list as checkpointing": (
        request(gradient_checkpointing=[]), 422, "invalid-request", "/activation_checkpointing",
    ),
    "rank of full training": (
        request(method={"name": "full", "r": 8}), 422, "invalid-request", "/method/r",
    ),
    "number of five thousand digits": (
        b'{"model": "gpt2", "seq_len": ' + b"9" * 5000 + b"}", 400, "malformed-document", None,
    ),
    "array": (b"[]", 422, "invalid-request", ""),
    "text": (b'"gpt2"', 422, "invalid-request", ""),
    "broken JSON": (b'{"model": "gpt2"', 400, "malformed-document", None),
    "YAML": (b"model: gpt2\n", 400, "malformed-document", None),
    "nothing": (b"", 400, "malformed-document", None),
    "binary": (bytes(range(256)), 400, "malformed-document", None),
    "gzip": (b"\x1f\x8b\x08\x00", 400, "malformed-document", None),
    "half of a surrogate": (b'{"model": "\\ud800"}', 400, "malformed-document", None),
    "nested without end": (b'{"model":' + b"[" * 100_000, 400, "malformed-document", None),
    "config without hidden_size": (config(hidden_size=None), 422, "invalid-config", None),
    "config of 10^9 layers": (config(num_hidden_layers=10**9), 422, "invalid-config", None),
    "config with text for a size": (config(hidden_size="64"), 422, "invalid-config", None),
    "config with a negative size": (config(hidden_size=-64), 422, "invalid-config", None),
    "config with NaN": (
        b'{"model": {"config": {"model_type": "llama", "hidden_size": NaN}}}',
        400, "malformed-document", None,
    ),
    "config that is empty": (b'{"model": {"config": {}}}', 422, "invalid-config", None),
    "config that is no object": (
        b'{"model": {"config": []}}', 422, "invalid-request", "/model/config",
    ),
    "config with remote code": (
        config(
            model_type="my_model",
            architectures=["MyModelForCausalLM"],
            auto_map={"AutoModelForCausalLM": "modeling_my_model.MyModelForCausalLM"},
        ),
        422, "unsupported-model", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_gets_a_problem_document(client, name):
    body, status, slug, pointer = BODIES[name]
    response = client.post(
        "/v1/estimate", content=body, headers={"Content-Type": "application/json"}
    )
    problem = response.json()
    assert (response.status_code, problem["type"]) == (status, f"/problems/{slug}"), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == "/v1/estimate"
    assert "\n" not in problem["detail"]
    if pointer is not None:
        assert pointer in [error["pointer"] for error in problem["errors"]]
    assert not any(leak in response.text for leak in LEAKS)


@pytest.mark.parametrize(
    "name",
    [
        "{folder}",
        "{folder}/config.json",
        "../config.json",
        "./config.json",
        "~/config.json",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/config.json",
        "https://example.org/model",
        "//example.org/model",
        "..",
        "a/../../b",
        "gpt2\u0000",
        "no-such-model" * 30,
    ],
)
def test_no_path_or_address_is_ever_followed(client, tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    body = json.dumps({"model": name.format(folder=tmp_path)})
    response = client.post(
        "/v1/estimate", content=body, headers={"Content-Type": "application/json"}
    )
    # Either it is no model id at all, or it is one that the catalogue does not have.
    assert response.status_code in (404, 422)
    assert response.json()["type"] in ("/problems/unknown-model", "/problems/invalid-request")


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-yaml", "multipart/form-data", "", "application/json; charset=x"],
)
def test_a_body_that_does_not_say_json_is_refused(client, kind):
    response = client.post("/v1/estimate", content=request(), headers={"Content-Type": kind})
    assert response.status_code == 415
    assert response.json()["type"] == "/problems/unsupported-media-type"


def test_a_body_of_50_mb_is_refused_and_the_client_reads_why(base_url):
    response = httpx2.post(
        f"{base_url}/v1/estimate",
        content=b'{"model": "' + b"x" * 50_000_000 + b'"}',
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert response.status_code == 413
    assert response.json()["type"] == "/problems/body-too-large"


def test_a_body_just_over_the_cap_is_refused_and_one_at_the_cap_is_read(client):
    cap = 256 * 1024
    for size, status in ((cap, 200), (cap + 1, 413)):
        response = client.post(
            "/v1/estimate",
            content=request().ljust(size),
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/nothing", 404, "not-found"),
        ("GET", "/static/../app.py", 404, "not-found"),
        ("GET", "/static/%2e%2e%2fapp.py", 404, "not-found"),
        ("GET", "/problems/nothing", 404, "not-found"),
        ("GET", "/v1/estimate", 405, "method-not-allowed"),
        ("DELETE", "/v1/models", 405, "method-not-allowed"),
        ("GET", "/v1/models?limit=0", 422, "invalid-request"),
        ("GET", "/v1/models?limit=many", 422, "invalid-request"),
    ],
)
def test_the_frameworks_refusals_are_problem_documents_too(client, method, path, status, slug):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"/problems/{slug}"


def test_a_refused_parameter_is_named(client):
    assert client.get("/v1/models?limit=0").json()["errors"][0]["parameter"] == "limit"


def test_a_failure_of_the_server_shows_nothing_of_its_inside(client, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr("web.door.estimate", fail)
    response = client.post("/v1/estimate", json={"model": MODEL})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == "/problems/internal-error"
    assert "secret" not in response.text
    assert "content-security-policy" in response.headers
