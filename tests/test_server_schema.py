"""The OpenAPI document: bodies that it allows, and ones that it does not, are answered,
never with an error of the server.
"""

import pytest
import schemathesis
import served
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ladder_jax.server.app import create_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server():
    with served.serve(served.shared_engine(), request_timeout=20.0) as running:
        yield running


SCHEMA = schemathesis.openapi.from_dict(create_app(writer=served.Log()).openapi())
OPERATIONS = {
    operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()
}


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_body_is_an_error_of_the_server(server, label):
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(OPERATIONS[label].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def run(case):
        response = case.call(base_url=server.url, timeout=60)
        case.validate_response(response, checks=CHECKS)

    run()
