"""Schemathesis in negative mode: whatever is wrong with a request, the answer is a 4xx in shape."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from support.gateway import Pair

from pagefork.http.openapi import document

ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
CHECKS = [
    not_a_server_error,
    negative_data_rejection,
    content_type_conformance,
    status_code_conformance,
    response_schema_conformance,
]
EXAMPLES = 40
MANY = 2000


def fuzz(pair: Pair, path: str, examples: int, mode: GenerationMode) -> None:
    """The statuses that requests of a mode are answered with."""
    schema = schemathesis.openapi.from_dict(document() | {"security": []})  # this gateway has no key
    session = requests.Session()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def check(data: Any) -> None:
        case = data.draw(schema[path]["POST"].as_strategy(generation_mode=mode))
        answer = case.call(base_url=pair.url, session=session, timeout=60, allow_redirects=False)
        assert answer.status_code < 500, (answer.status_code, answer.content, case.as_curl_command())
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        case.validate_response(answer, checks=CHECKS)

    check()
    session.close()
    assert pair.complete(max_tokens=1).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_no_bad_body_is_a_failure_of_the_server(pair: Pair, path: str) -> None:
    fuzz(pair, path, EXAMPLES, GenerationMode.NEGATIVE)


@pytest.mark.parametrize("path", ROUTES[2:])
def test_no_good_body_is_a_failure_of_the_server(pair: Pair, path: str) -> None:
    fuzz(pair, path, EXAMPLES, GenerationMode.POSITIVE)


@pytest.mark.long
@pytest.mark.parametrize("path", ROUTES)
def test_no_bad_body_of_many_is_a_failure_of_the_server(pair: Pair, path: str) -> None:
    fuzz(pair, path, MANY, GenerationMode.NEGATIVE)


def test_the_description_is_a_valid_one_of_every_route(pair: Pair) -> None:
    found = pair.get("/openapi.json").json()
    schemathesis.openapi.from_dict(found).validate()
    assert found == document()
    for path, operations in found["paths"].items():
        for method in operations:
            answer = requests.request(method, pair.url + path.replace("{model}", "demo"), timeout=30)
            assert answer.status_code not in (404, 405), path
