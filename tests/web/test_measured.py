"""`POST /v1/reconcile` and the box "I measured ..." below the page's answer."""

import html
import json
import re

import pytest

RUN = {"model": "HuggingFaceTB/SmolLM2-135M", "seq_len": 512}
QUERY = {"model": "HuggingFaceTB/SmolLM2-135M", "seq-len": "512"}
# transformers#36097
MESSAGE = (
    "CUDA out of memory. Tried to allocate 150.00 MiB. GPU 0 has a total capacity of 3.80 GiB of "
    "which 130.31 MiB is free. Including non-PyTorch memory, this process has 3.66 GiB memory in "
    "use. Of the allocated memory 3.52 GiB is allocated by PyTorch, and 53.87 MiB is reserved by "
    "PyTorch but unallocated."
)
ATTACK = '"><script>alert(1)</script>'


def explained(text):
    return html.unescape(re.search(r'id="explained"[^>]*>(.*?)</p>', text, re.DOTALL)[1])


# -- the API -----------------------------------------------------------------------------------


def test_a_measurement_gets_what_would_explain_it(client):
    response = client.post("/v1/reconcile", json={"request": RUN, "measured": "3GiB"})
    assert response.status_code == 200
    document = response.json()
    assert document["schema"] == "reconcile/v1"
    assert document["hypotheses"][0]["left_bytes"] == document["unexplained_bytes"]
    assert response.headers["etag"]


def test_a_message_alone_is_an_answer(client):
    document = client.post("/v1/reconcile", json={"message": MESSAGE}).json()
    assert document["out_of_memory"]["findings"][0]["cause"] == "shortage"
    assert document["request"] is None


BODIES = {
    "nothing": ({}, 422, "/measured"),
    "no request": ({"measured": "3GiB"}, 422, "/request"),
    "no unit": ({"request": RUN, "measured": "3"}, 422, "/measured"),
    "unknown field": ({"request": RUN, "size": 3}, 422, "/size"),
    "unknown field of the request": ({"request": {"modle": "x"}}, 422, "/request/modle"),
    "unknown meter": ({"request": RUN, "measured": "3GiB", "meter": "x"}, 422, "/meter"),
    "gpu of this machine": (
        {"request": {**RUN, "hardware": "auto"}, "measured": "3GiB"}, 422, "/hardware/gpu",
    ),
    "no message in the text": ({"message": "Killed"}, 422, None),
    "unknown model": ({"request": {"model": "a/b"}, "measured": "3GiB"}, 404, None),
    "a list": ([], 422, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_measurement_gets_a_problem_that_points_at_it(client, name):
    body, status, pointer = BODIES[name]
    response = client.post("/v1/reconcile", json=body)
    assert response.status_code == status
    problem = response.json()
    assert problem["instance"] == "/v1/reconcile"
    assert "\n" not in problem["detail"]
    assert pointer is None or pointer in [each["pointer"] for each in problem["errors"]]


def test_a_body_that_is_too_large_is_refused(client):
    body = json.dumps({"message": "x" * (256 * 1024)})
    response = client.post(
        "/v1/reconcile", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


def test_a_text_of_digits_alone_is_read_as_fast_as_any(client):
    assert client.post("/v1/reconcile", json={"message": "1" * 199_000}).status_code == 422


# -- the page ----------------------------------------------------------------------------------


def test_the_box_stands_below_every_answer_and_keeps_the_run(client):
    text = client.get("/", params=QUERY).text
    box = text[text.index('id="measurement"') :]
    assert text.index('id="verdict"') < text.index('id="measurement"')
    assert '<input type="hidden" name="model" value="HuggingFaceTB/SmolLM2-135M">' in box
    assert '<input type="hidden" name="seq-len" value="512">' in box


def test_a_number_is_explained_without_javascript(client):
    response = client.get("/", params={**QUERY, "measured": "3GiB", "meter": "reserved"})
    assert response.status_code == 200
    api = client.post(
        "/v1/reconcile", json={"request": RUN, "measured": "3GiB", "meter": "reserved"}
    ).json()
    assert explained(response.text) == api["message"]
    assert 'id="hypotheses"' in response.text
    assert '<option value="reserved" selected>' in response.text


def test_a_pasted_message_is_explained_beside_the_run_and_alone(client):
    beside = client.get("/", params={**QUERY, "oom": MESSAGE}).text
    assert explained(beside).startswith("Shortage:")
    alone = client.get("/", params={"oom": MESSAGE}).text
    assert explained(alone).startswith("Shortage:")
    assert "Name a model" in alone


def test_a_bad_number_is_refused_in_the_box_and_the_answer_stays(client):
    response = client.get("/", params={**QUERY, "measured": "3"})
    assert response.status_code == 200
    assert "write a unit" in explained(response.text)
    assert 'id="components"' in response.text


def test_a_message_that_no_address_holds_is_refused(client):
    text = client.get("/", params={**QUERY, "oom": "x" * 4_001}).text
    assert "send all of it to POST /v1/reconcile" in explained(text)


@pytest.mark.parametrize("field", ["measured", "meter", "oom"])
def test_what_is_pasted_is_shown_and_never_run(client, field):
    query = {**QUERY, "measured": "3GiB", field: ATTACK}
    assert "<script>alert" not in client.get("/", params=query).text


def test_the_command_and_the_suggestions_of_the_page_are_those_of_the_run(client):
    query = {**QUERY, "measured": "3GiB"}
    text = client.get("/", params=query).text
    assert "--measured" not in re.search(r'aria-label="Command line">(.*?)</pre>', text)[1]
