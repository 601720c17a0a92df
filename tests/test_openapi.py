"""The OpenAPI document: valid, complete, and true, which Schemathesis finds out by asking every route."""

from __future__ import annotations

import ipaddress
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
import schemathesis.engine
from conftest import ADMIN_TOKEN, OPERATOR, Server, bearer
from flask import Flask
from flask.testing import FlaskClient
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from schemathesis import AuthContext, Case
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

import glossary
import openapi

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json or {})


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    validate(document)


def test_every_route_is_in_it(app: Flask, document: dict[str, Any]) -> None:
    routes = {
        (re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }
    assert routes == {(path, method) for path, method, _ in openapi.operations(document)}


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does(document: dict[str, Any]) -> None:
    operations = [operation for _, _, operation in openapi.operations(document)]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["summary"]
        assert operation["tags"][0] in [tag["name"] for tag in document["tags"]]


def test_its_server_is_the_issuer(make_app: Callable[..., Flask]) -> None:
    issuer = "https://id.example.com/lanyard"
    document = make_app(ISSUER=issuer).test_client().get("/openapi.json").json
    assert document["servers"] == [{"url": issuer}]


def test_it_is_cacheable_and_carries_an_etag(client: FlaskClient) -> None:
    response = client.get("/openapi.json")
    assert response.headers["Cache-Control"] == "public, max-age=3600"
    again = client.get("/openapi.json", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_every_example_is_true_to_its_schema(document: dict[str, Any]) -> None:
    medias = []
    for _, _, operation in openapi.operations(document):
        medias += operation.get("requestBody", {"content": {}})["content"].values()
        for response in operation["responses"].values():
            medias += openapi.resolve(document, response).get("content", {}).values()
    for media in medias:
        schema = {**media["schema"], "components": document["components"]}
        examples = [example["value"] for example in media.get("examples", {}).values()]
        for example in [*examples, *([media["example"]] if "example" in media else [])]:
            OAS31Validator(schema, format_checker=OAS31Validator.FORMAT_CHECKER).validate(example)


def test_local_mode_asks_the_operator_for_nothing(make_app: Callable[..., Flask]) -> None:
    document = make_app(LOCAL="1").test_client().get("/openapi.json").json
    assert {} in document["paths"]["/api/agents"]["post"]["security"]
    assert {} not in document["paths"]["/api/agents/me"]["get"]["security"]
    assert "403" in document["paths"]["/health"]["get"]["responses"]


@schemathesis.hook
def before_call(context: Any, case: Case, kwargs: dict[str, Any]) -> None:
    """Put in what no schema can describe: integers, keys on their curve, hosts that are there."""
    # From an address of its own each time: wrong tokens, of which there are many, throttle who sent them.
    case.headers["X-Forwarded-For"] = str(ipaddress.IPv4Address(secrets.randbits(32)))
    if case.meta is None or not case.meta.generation.mode.is_positive or not isinstance(case.body, dict):
        return
    good = {"jwks": {"keys": [glossary.EXAMPLES["PublicKey"]]}, "url": "http://127.0.0.1:9/hook"}
    for name, value in case.body.items():
        # To JSON Schema 1.0 is an integer.
        case.body[name] = int(value) if isinstance(value, float) else value and good.get(name, value)


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    settings = {"ADMIN_TOKEN": ADMIN_TOKEN, "WEBHOOK_ALLOW_PRIVATE": "1", "TRUSTED_PROXIES": "1"}
    return serve(WORKERS="1", **settings).wait()


def failures(server: Server, header: Callable[[], dict[str, str]], **others: list[str]) -> list[str]:
    """What Schemathesis finds in all its phases with all its checks, as the caller that the header names.

    :param others: operations that are not for this caller.
    """

    class Caller:
        def get(self, case: Case, context: AuthContext) -> dict[str, str]:
            return header()

        def set(self, case: Case, made: dict[str, str], context: AuthContext) -> None:
            case.headers.update(made)

    config = tomllib.loads(CONFIG.read_text())
    config["operations"].append({**others, "enabled": False})
    config["base-url"] = server.url
    schema = schemathesis.openapi.from_url(
        f"{server.url}/openapi.json", config=schemathesis.Config.from_dict(config)
    )
    schema.auth(refresh_interval=None)(Caller)
    return list(_failures(schema))


def _failures(schema: Any) -> Iterator[str]:
    asked: Counter[int] = Counter()
    for event in schemathesis.engine.from_schema(schema).execute():
        assert not isinstance(event, FatalError | NonFatalError), event
        if isinstance(event, ScenarioFinished):
            answers = [found.response for found in event.recorder.interactions.values()]
            asked.update(answer.status_code for answer in answers if answer)
            for check in chain.from_iterable(event.recorder.checks.values()):
                if check.failure_info:
                    failure = check.failure_info.failure
                    yield f"{failure.operation}: {failure} {check.failure_info.code_sample}"
    # Else the operations were not reached at all.
    assert asked[200] > 10
    assert asked[429] == 0


def test_the_operator_gets_what_the_document_says(server: Server) -> None:
    assert failures(server, lambda: OPERATOR, **{"include-tag": ["me"]}) == []


def test_an_agent_gets_what_the_document_says(server: Server) -> None:
    def header() -> dict[str, str]:
        # A new one each time: some of what it may do is its end.
        agent = requests.post(f"{server.url}/api/agents", json={"name": "an agent"}, headers=OPERATOR).json()
        grant = {"grant_type": "client_credentials"}
        proof = (agent["client_id"], agent["client_secret"])
        return bearer(requests.post(f"{server.url}/oauth/token", grant, auth=proof).json())

    assert failures(server, header, **{"exclude-tag": ["me"]}) == []
