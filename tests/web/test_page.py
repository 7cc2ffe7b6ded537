"""The page as the server sends it, which is what a browser without JavaScript shows."""

import html
import re

import pytest

from estimator.units import gib

QUERY = {"model": "llama-3.1-8b", "gpu": "rtx-4090", "method": "qlora"}
MODEL = "HuggingFaceTB/SmolLM2-135M"
ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def test_an_empty_page_asks_for_a_model_and_offers_examples(client):
    text = client.get("/").text
    assert "Name a model" in text
    assert 'href="/?model=meta-llama%2FLlama-3.1-8B&amp;method=qlora&amp;gpu=rtx-4090"' in text


def test_every_example_has_an_answer(client):
    links = re.findall(r'class="apply" href="([^"]+)"', client.get("/").text)
    assert links
    for link in links:
        response = client.get(html.unescape(link))
        assert response.status_code == 200
        assert 'id="components"' in response.text


def test_the_page_shows_the_answer_of_the_api(client):
    run = {"model": "llama-3.1-8b", "method": "qlora", "hardware": {"gpu": "rtx-4090"}}
    answer = client.post("/v1/estimate", json=run).json()
    text = html.unescape(client.get("/", params=QUERY).text)
    assert answer["message"] in text
    assert gib(answer["peak"]["needed_bytes"]["expected"]) in text
    for part in answer["breakdown"]:
        assert not part["bytes"] or gib(part["bytes"]) in text
    for moment in answer["timeline"]:
        assert moment["moment"] in text
    for line in (*answer["assumptions"], *answer["notes"], *answer["not_modelled"]):
        assert line in text
    for suggestion in answer["suggestions"]:
        assert suggestion["summary"] in text


def test_every_suggestion_is_an_address_that_has_an_answer(client):
    query = {"model": "llama-3.1-8b", "gpu": "rtx-4090"}
    links = re.findall(r'class="apply" href="([^"]+)"', client.get("/", params=query).text)
    assert links
    for link in links:
        assert 'id="components"' in client.get(html.unescape(link)).text


def test_the_form_shows_the_state_of_the_address(client):
    text = client.get("/", params={**QUERY, "seq-len": "4096"}).text
    assert re.search(r'id="seq-len"[^>]* value="4096"', text)
    assert '<option value="rtx-4090" selected>' in text
    assert '<option value="qlora" selected>' in text


def test_any_name_of_a_card_selects_its_entry(client):
    text = client.get("/", params={"model": MODEL, "gpu": "NVIDIA GeForce RTX 4090"}).text
    assert '<option value="rtx-4090" selected>' in text


def test_every_control_has_a_label(client):
    text = client.get("/").text
    names = re.findall(r'<(?:input|select|textarea) id="([^"]+)"', text)
    assert len(names) > 20
    assert all(f'<label for="{name}">' in text for name in names)


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({"model": "llama-3.1-8c"}, 404, "meta-llama/Llama-3.1-8B"),
        ({"model": MODEL, "gpu": "rtx-9999"}, 422, "unknown GPU"),
        ({"model": MODEL, "gpu": "auto"}, 422, "is not yours"),
        ({"model": MODEL, "seq-len": "long"}, 422, "not a valid integer"),
        ({"model": MODEL, "seq-len": "0"}, 422, "expected int >= 1"),
        ({"config": "{"}, 400, "not valid JSON"),
        ({"model": MODEL, "colour": "red"}, 422, "unknown field"),
    ],
)
def test_a_refusal_is_said_on_the_page_and_in_its_status(client, query, status, words):
    response = client.get("/", params=query)
    assert response.status_code == status
    assert words in html.unescape(response.text)
    assert client.get("/answer", params=query).status_code == 200


@pytest.mark.parametrize("name", ["model", "gpu", "seq-len", "config", "precision", "x"])
def test_what_a_visitor_types_is_never_markup(client, name):
    for value in (ATTACK, "{{ 7 * 7 }}", "</textarea>" + ATTACK, "javascript:alert(1)"):
        text = client.get("/", params={"model": MODEL, name: value}).text
        assert "<script>alert" not in text
        assert "<img" not in text
        assert "49" not in re.findall(r"<p class=\"message\">.*", text)[0].replace(value, "")
    text = client.get("/", params={ATTACK: "1", "model": MODEL}).text
    assert "<script>alert" not in text


def test_a_config_is_data_even_where_the_chart_reads_it(client):
    config = '{"model_type": "</script><script>alert(1)</script>", "hidden_size": 1}'
    assert "<script>alert" not in client.get("/", params={"config": config}).text


def test_the_page_loads_only_its_own_files(client):
    text = client.get("/", params=QUERY).text
    for address in re.findall(r'(?:src|href|action|data-plotly)="([^"]*)"', text):
        assert address.startswith("/")
        assert not address.startswith("//")
    assert " style=" not in text
    assert "onclick" not in text


def test_plotly_comes_from_the_installed_package_and_is_kept_by_the_browser(client):
    path = re.findall(r'data-plotly="([^"]+)"', client.get("/").text)[0]
    response = client.get(path)
    assert response.status_code == 200
    assert "immutable" in response.headers["cache-control"]
    assert response.headers["content-encoding"] == "gzip"
    assert b"plotly.js" in response.content[:200]
    plain = client.get(path, headers={"Accept-Encoding": "identity"})
    assert plain.content == response.content


def test_the_waterfall_is_a_table_when_it_is_asked_for(client):
    query = {**QUERY, "waterfall": "true"}
    text = html.unescape(client.get("/", params=query).text)
    run = {"model": "llama-3.1-8b", "method": "qlora", "hardware": {"gpu": "rtx-4090"}}
    steps = client.post("/v1/estimate", json={**run, "waterfall": True}).json()["waterfall"]
    assert len(steps) > 3
    for step in steps:
        assert step["summary"] in text
        assert gib(step["needed_bytes"]) in text
        assert step["price"] in text
    assert 'id="waterfall-steps"' not in client.get("/", params=QUERY).text
