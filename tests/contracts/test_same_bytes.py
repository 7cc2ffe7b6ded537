"""One core behind all doors: the same request gets the same bytes through each of them."""

import io
import json
import shlex
import sys
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from estimator.catalog import Access
from estimator.commands import run
from estimator.errors import UnsupportedCombinationError
from estimator.render.document import to_json
from estimator.request import parse_request
from estimator.service import estimate, reconcile
from web.app import create_app

# Each request as a document, and as the flags that say the same.
REQUESTS = {
    "only a model": ({"model": "meta-llama/Llama-3.1-8B"}, "--model meta-llama/Llama-3.1-8B"),
    "a short name": ({"model": "llama-3.1-8b"}, "--model llama-3.1-8b"),
    "full fine-tuning": (
        {
            "model": "mistralai/Mistral-7B-v0.1",
            "micro_batch_size": 4,
            "seq_len": 4096,
            "activation_checkpointing": "full",
            "attention": "flash_attention_2",
            "optimizer": {"name": "adamw", "implementation": "foreach"},
            "hardware": {"gpu": "a100-80gb"},
        },
        "--model mistralai/Mistral-7B-v0.1 --micro-batch-size 4 --seq-len 4096 --gpu a100-80gb"
        " --activation-checkpointing full --attention flash_attention_2"
        " --optimizer adamw --optimizer-implementation foreach",
    ),
    "lora": (
        {
            "model": "Qwen/Qwen2.5-7B",
            "method": {"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
            "padding": True,
            "hardware": {"gpu": "rtx-4090", "reserved_by_others_bytes": 2**30},
        },
        "--model Qwen/Qwen2.5-7B --method lora --lora-r 8 --target-modules q_proj,v_proj"
        " --padding --gpu rtx-4090 --reserved-by-others 1GiB",
    ),
    "qlora, in one word": (
        {"model": "llama-3.1-8b", "method": "qlora", "optimizer": "paged_adamw8bit"},
        "--model llama-3.1-8b --method qlora --optimizer paged_adamw8bit",
    ),
    "autocast over fp32, a card given by its size": (
        {
            "model": "HuggingFaceTB/SmolLM2-135M",
            "precision": "amp_bf16",
            "hardware": {"memory_bytes": 8 * 2**30},
        },
        "--model HuggingFaceTB/SmolLM2-135M --precision amp_bf16 --memory 8GiB",
    ),
}


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app()) as client:
        yield client


def printed(monkeypatch, *arguments: str) -> bytes:
    """Return what the command line writes to standard output, byte for byte."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding="utf-8", write_through=True))
    # 0 fits, or there is nothing to judge by; 1 does not fit.
    assert run(arguments) in (0, 1), err.getvalue().decode()
    return out.getvalue()


@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_request_gets_the_same_bytes_through_every_door(
    name, client, monkeypatch, tmp_path
):
    document, flags = REQUESTS[name]
    body = json.dumps(document).encode()
    in_file = tmp_path / "request.json"
    in_file.write_bytes(body)

    from_python = to_json(estimate(parse_request(body), access=Access.CATALOGUE))

    from_flags = printed(monkeypatch, *shlex.split(flags), "--offline", "--json")
    from_file = printed(monkeypatch, "--request", str(in_file), "--offline", "--json")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(body)))
    from_stdin = printed(monkeypatch, "--request", "-", "--offline", "--json")
    from_http = client.post(
        "/v1/estimate", content=body, headers={"Content-Type": "application/json"}
    ).content

    assert from_flags == from_python
    assert from_file == from_python
    assert from_stdin == from_python
    assert from_http == from_python
    assert json.loads(from_python)["schema"] == "estimate/v1"


def test_what_was_asked_before_does_not_answer_for_eight_cards():
    """One card was answered, and its engine is kept; eight of them still have no answer."""
    request = {"model": "meta-llama/Llama-3.1-8B", "hardware": {"gpu": "h100-80gb-sxm5"}}
    assert estimate(request).verdict != "unknown"
    with pytest.raises(UnsupportedCombinationError):
        estimate({**request, "hardware": {**request["hardware"], "num_gpus": 8}})


MEASUREMENT = {
    "request": REQUESTS["lora"][0],
    "measured": "31.5GiB",
    "meter": "nvidia-smi",
    "message": "CUDA out of memory. Tried to allocate 2.32 GiB (GPU 0; 23.69 GiB total capacity; "
    "20.00 GiB already allocated; 1.10 GiB free; 21.50 GiB reserved in total by PyTorch)",
}


def test_the_same_measurement_gets_the_same_bytes_through_every_door(client, monkeypatch, tmp_path):
    from_python = to_json(reconcile(MEASUREMENT, access=Access.CATALOGUE))

    message = tmp_path / "error.txt"
    message.write_text(MEASUREMENT["message"])
    from_flags = printed(
        monkeypatch, "reconcile", *shlex.split(REQUESTS["lora"][1]), "--measured", "31.5GiB",
        "--meter", "nvidia-smi", "--oom", str(message), "--offline", "--json",
    )  # fmt: skip
    from_http = client.post("/v1/reconcile", json=MEASUREMENT).content

    assert from_flags == from_python
    assert from_http == from_python
    assert json.loads(from_python)["schema"] == "reconcile/v1"
