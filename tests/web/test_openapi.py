"""The OpenAPI document, and a client that does everything it allows and much that it does not."""

import html

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from jsonschema_rs import validator_for
from schemathesis.checks import CHECKS

from estimator.errors import EstimatorError
from estimator.request import EstimateRequest
from web.app import create_app
from web.problems import known

RUN = {"model": "llama-3.1-8b", "method": "qlora", "hardware": {"gpu": "rtx-4090"}}


@pytest.fixture
def document(client):
    return client.get("/openapi.json").json()


def test_the_document_is_openapi_3_1_and_names_every_route(document):
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        "/v1/estimate", "/v1/reconcile", "/v1/models", "/v1/gpus", "/v1/version", "/healthz",
        "/readyz",
    }  # fmt: skip


def test_the_body_of_an_estimate_is_the_request_document(document):
    fields = document["components"]["schemas"]["EstimateRequest"]["properties"]
    assert set(EstimateRequest.__struct_fields__) <= set(fields)


def test_every_answer_of_an_estimate_is_described(document):
    responses = document["paths"]["/v1/estimate"]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "413", "415", "422", "500", "501"}
    assert all(
        "application/problem+json" in response["content"]
        for status, response in responses.items()
        if status != "200"
    )


def test_the_document_describes_the_request_and_the_result_as_they_are(client, document):
    schemas = {"components": document["components"]}
    request = {**schemas, "$ref": "#/components/schemas/EstimateRequest"}
    assert validator_for(request).is_valid(RUN)
    result = {**schemas, "$ref": "#/components/schemas/Result"}
    validator_for(result).validate(client.post("/v1/estimate", json=RUN).json())


def test_the_document_describes_a_measurement_and_what_explains_it_as_they_are(client, document):
    schemas = {"components": document["components"]}
    asked = {"request": RUN, "measured": "19.4GiB", "meter": "reserved"}
    measurement = {**schemas, "$ref": "#/components/schemas/Measurement"}
    assert validator_for(measurement).is_valid(asked)
    assert not validator_for(measurement).is_valid({**asked, "meter": "volt"})
    result = {**schemas, "$ref": "#/components/schemas/Reconciliation"}
    validator_for(result).validate(client.post("/v1/reconcile", json=asked).json())


def test_every_refusal_of_the_core_has_a_page_behind_its_type(client):
    assert EstimatorError.slug in known()
    for slug, (title, _) in known().items():
        assert title in html.unescape(client.get(f"/problems/{slug}").text)


schema = schemathesis.openapi.from_asgi("/openapi.json", create_app())

# What a schema cannot say: which well-formed requests have a sourced answer, so that a body that
# keeps to the schema may still get 422.
CHECKED = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_api_keeps_what_its_document_promises(case):
    case.call_and_validate(checks=CHECKED)
