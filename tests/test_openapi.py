"""The OpenAPI document: valid, complete, and true, which Schemathesis finds out by asking every route."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import requests
import schemathesis
import schemathesis.engine
from flask import Flask
from flask.testing import FlaskClient
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from schemathesis import AuthContext, Case
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from support.callers import OPERATOR, Operator, ask_token, bearer
from support.instances import ADMIN_TOKEN
from support.servers import Server

from config import HERE
from schemas import JWK

CONFIG = HERE / "tests/support/schemathesis.toml"


STATUSES = """
POST /oauth/token 200 400 401 413 429 503
POST /oauth/refresh 200 400 401 413 429 503
POST /oauth/introspect 200 400 401 413 429 503
POST /oauth/revoke 200 400 401 413 429 503
GET /oauth/authorize 400
POST /api/agents 201 400 401 403 413 415 429 503
GET /api/agents 200 400 401 403 429 503
GET /api/agents/{agent_id} 200 401 403 404 429 503
PUT /api/agents/{agent_id} 200 400 401 403 404 409 413 415 429 503
PATCH /api/agents/{agent_id} 200 400 401 403 404 409 413 415 429 503
DELETE /api/agents/{agent_id} 204 401 403 404 429 503
POST /api/agents/{agent_id} 200 400 401 403 404 409 413 415 429 503
POST /api/agents/{agent_id}/rotate 200 400 401 403 404 409 413 415 429 503
POST /api/agents/{agent_id}/deactivate 200 400 401 403 404 413 415 429 503
POST /api/agents/{agent_id}/reactivate 200 400 401 403 404 409 413 415 429 503
GET /api/agents/{agent_id}/secrets 200 401 403 404 429 503
DELETE /api/agents/{agent_id}/secrets/{secret_id} 204 401 403 404 429 503
GET /api/agents/me 200 401 503
DELETE /api/agents/me 204 401 503
GET /api/agents/me/usage 200 401 503
POST /api/agents/me/rotate 200 400 401 409 413 415 503
POST /api/agents/me/deactivate 200 400 401 413 415 503
GET /api/webhook-events 200 401 403 429 503
POST /api/webhooks 201 400 401 403 413 415 429 503
GET /api/webhooks 200 401 403 429 503
GET /api/webhooks/{webhook_id} 200 401 403 404 429 503
PUT /api/webhooks/{webhook_id} 200 400 401 403 404 413 415 429 503
PATCH /api/webhooks/{webhook_id} 200 400 401 403 404 413 415 429 503
DELETE /api/webhooks/{webhook_id} 204 401 403 404 429 503
POST /api/webhooks/{webhook_id}/rotate 200 400 401 403 404 413 415 429 503
POST /api/webhooks/{webhook_id}/test 202 400 401 403 404 409 413 415 429 503
GET /api/webhooks/{webhook_id}/deliveries 200 400 401 403 404 429 503
GET /api/webhooks/{webhook_id}/deliveries/{delivery_id} 200 401 403 404 429 503
POST /api/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver 202 400 401 403 404 409 413 415 429 503
GET /api/keys 200 401 403 429 503
POST /api/keys/rotate 200 400 401 403 413 415 429 503
GET /api/events 200 400 401 403 429 503
GET /.well-known/openid-configuration 200 304
GET /.well-known/oauth-authorization-server 200 304
GET /.well-known/oauth-protected-resource 200 304
GET /.well-known/jwks.json 200 304 503
GET / 200
GET /health 200
GET /health/ready 200 503
GET /openapi.json 200 304
GET /metrics 200 401 403 429 503
"""
GRANT_CODES = {
    "invalid_request",
    "invalid_grant",
    "invalid_scope",
    "invalid_target",
    "unsupported_grant_type",
}
OAUTH_CODES = {
    ("/oauth/token", 400): GRANT_CODES,
    ("/oauth/refresh", 400): GRANT_CODES,
    ("/oauth/introspect", 400): {"invalid_request"},
    ("/oauth/revoke", 400): {"invalid_request", "invalid_grant"},
    ("/oauth/authorize", 400): {"unsupported_response_type"},
    ("/oauth/token", 401): {"invalid_client"},
    ("/oauth/refresh", 401): {"invalid_client"},
    ("/oauth/introspect", 401): {"invalid_client", "invalid_token"},
    ("/oauth/revoke", 401): {"invalid_client", "invalid_token"},
}
CODES = {
    400: {"invalid_request"},
    401: {"unauthorized", "invalid_token"},
    403: {"insufficient_scope"},
    404: {"not_found"},
    409: {"conflict"},
    413: {"payload_too_large"},
    415: {"unsupported_media_type"},
    429: {"too_many_requests"},
    503: {"temporarily_unavailable"},
}


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json or {})


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The path, the method and the operation, of each."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method, operation


def resolve(document: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The component that a `$ref` names, or the object itself."""
    if "$ref" not in found:
        return found
    _, _, kind, name = found["$ref"].split("/")
    return dict(document["components"][kind][name])


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    validate(document)


def test_every_route_is_in_the_document(app: Flask, document: dict[str, Any]) -> None:
    routes = {
        (re.sub(r"<(?:[^:<>]+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        if not rule.endpoint.startswith("docs.")  # pages for people
        for method in (rule.methods or set()) - {"HEAD"}
    }
    assert routes == {(path, method) for path, method, _ in operations(document)}


def codes(document: dict[str, Any], operation: dict[str, Any], status: int) -> set[str]:
    """The error codes that an operation may answer with a status."""
    response = resolve(document, operation["responses"].get(str(status), {}))
    content = response.get("content", {}).get("application/json", {})
    return {example["value"]["error"] for example in content.get("examples", {}).values()}


def test_every_operation_has_these_statuses(document: dict[str, Any]) -> None:
    found = [
        " ".join([method.upper(), path, *sorted(operation["responses"])])
        for path, method, operation in operations(document)
    ]
    assert found == STATUSES.strip().splitlines()


def test_every_error_code_has_an_example(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        for status in map(int, operation["responses"]):
            expected = OAUTH_CODES.get((path, status), CODES.get(status, set()))
            assert codes(document, operation, status) == expected, (path, status)


def test_every_documented_oauth_error_code_occurs(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], token: dict[str, Any]
) -> None:
    good = {name: agent[name] for name in ("client_id", "client_secret")}
    wrong = {**good, "client_secret": "cs_wrong"}
    others = ask_token(client, operator.create()).json
    grant = {"grant_type": "client_credentials", **good}
    refresh = {"refresh_token": token["refresh_token"], **good}
    bodies: dict[str, list[dict[str, str]]] = {
        "/oauth/token": [
            {},
            {"grant_type": "password"},
            {"grant_type": "refresh_token", "refresh_token": "rt_unknown"},
            {**grant, "scope": "another"},
            {**grant, "resource": "another"},
            {**grant, **wrong},
        ],
        "/oauth/refresh": [
            {},
            {"grant_type": "password"},
            {"refresh_token": "rt_unknown"},
            {**refresh, "scope": "another"},
            {**refresh, "resource": "another"},
            {**refresh, **wrong},
        ],
        "/oauth/introspect": [good, wrong],
        "/oauth/revoke": [good, wrong, {"token": others["access_token"], **good}],
    }
    answers = [client.post(path, data=body) for path, tried in bodies.items() for body in tried]
    stranger = bearer({"access_token": "x"})
    answers += [client.post(path, data={"token": "x"}, headers=stranger) for path in list(bodies)[2:]]
    answers.append(client.get("/oauth/authorize"))
    found: dict[tuple[str, int], set[str]] = {}
    for answer in answers:
        found.setdefault((answer.request.path, answer.status_code), set()).add(answer.json["error"])
    assert found == OAUTH_CODES


def test_oauth_bodies_are_forms_and_others_json(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        kind = "x-www-form-urlencoded" if path.startswith("/oauth/") else "json"
        for body in [operation["requestBody"]] if "requestBody" in operation else []:
            assert list(body["content"]) == [f"application/{kind}"]
            assert body["content"][f"application/{kind}"]["examples"]


def test_every_operation_has_a_unique_id_and_a_summary(document: dict[str, Any]) -> None:
    found = [operation for _, _, operation in operations(document)]
    assert len({operation["operationId"] for operation in found}) == len(found)
    for operation in found:
        assert operation["summary"]
        assert operation["tags"][0] in [tag["name"] for tag in document["tags"]]


def test_the_documents_server_is_the_issuer(make_app: Callable[..., Flask]) -> None:
    issuer = "https://id.example.com/lanyard"
    document = make_app(ISSUER=issuer).test_client().get("/openapi.json").json
    assert document["servers"] == [{"url": issuer}]


def test_the_document_is_cacheable_and_has_an_etag(client: FlaskClient) -> None:
    response = client.get("/openapi.json")
    assert response.headers["Cache-Control"] == "public, max-age=3600"
    again = client.get("/openapi.json", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_every_example_is_true_to_its_schema(document: dict[str, Any]) -> None:
    components = document["components"]
    medias = []
    for _, _, operation in operations(document):
        medias += operation.get("requestBody", {"content": {}})["content"].values()
        for response in operation["responses"].values():
            medias += resolve(document, response).get("content", {}).values()
    found = [
        (media["schema"], example["value"])
        for media in medias
        for example in media.get("examples", {}).values()
    ]
    assert len(found) > 100
    for schema in components["schemas"].values():
        found += [
            (field, value) for field in schema["properties"].values() for value in field.get("examples", [])
        ]
    for schema, value in found:
        whole = {**schema, "components": components}
        OAS31Validator(whole, format_checker=OAS31Validator.FORMAT_CHECKER).validate(value)


def test_every_field_of_a_body_has_a_description(document: dict[str, Any]) -> None:
    # Discovery documents are described by their RFCs.
    schemas = document["components"]["schemas"].items()
    silent = {
        f"{name}.{field}"
        for name, schema in schemas
        if name not in ("ServerMetadata", "ResourceMetadata")
        for field, shape in schema["properties"].items()
        if not {"description", "$ref", "enum"} & set(shape) and "$ref" not in shape.get("items", {})
    }
    assert silent == set()


def test_local_mode_needs_no_security_scheme(make_app: Callable[..., Flask]) -> None:
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
    good = {"jwks": {"keys": [JWK]}, "url": "http://127.0.0.1:9/hook"}
    for name, value in case.body.items():
        # To JSON Schema 1.0 is an integer.
        case.body[name] = int(value) if isinstance(value, float) else value and good.get(name, value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"ADMIN_TOKEN": ADMIN_TOKEN, "WEBHOOK_ALLOW_PRIVATE": "1", "TRUSTED_PROXIES": "1"}
    started = Server(tmp_path_factory.mktemp("server"), WORKERS="1", **settings)
    yield started.wait()
    started.kill()


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
    if os.environ.get("HYPOTHESIS_PROFILE") != "long":
        config["generation"]["max-examples"] = 4
        config["phases"]["stateful"]["generation"]["max-examples"] = 3
        config["phases"]["coverage"] = {"enabled": False}
        config["operations"] = [one for one in config["operations"] if "phases" not in one]
    schema = schemathesis.openapi.from_url(
        f"{server.url}/openapi.json", config=schemathesis.Config.from_dict(config)
    )
    schema.auth(refresh_interval=None)(Caller)
    document = requests.get(f"{server.url}/openapi.json").json()
    return list(_failures(schema, document))


def _failures(schema: Any, document: dict[str, Any]) -> Iterator[str]:
    asked: Counter[int] = Counter()
    for event in schemathesis.engine.from_schema(schema).execute():
        assert not isinstance(event, FatalError | NonFatalError), event
        if isinstance(event, ScenarioFinished):
            answers = [found.response for found in event.recorder.interactions.values()]
            asked.update(answer.status_code for answer in answers if answer)
            yield from _undocumented_codes(event.recorder, document)
            for check in chain.from_iterable(event.recorder.checks.values()):
                if check.failure_info:
                    failure = check.failure_info.failure
                    yield f"{failure.operation}: {failure} {check.failure_info.code_sample}"
    # Else the operations were not reached at all.
    assert asked[200] > 10
    assert asked[429] == 0


def _undocumented_codes(recorder: Any, document: dict[str, Any]) -> Iterator[str]:
    for case_id, interaction in recorder.interactions.items():
        case, answer = recorder.cases[case_id].value, interaction.response
        operation = document["paths"][case.operation.path].get(case.method.lower())
        # Schemathesis itself finds the statuses that are not documented.
        known = codes(document, operation, answer.status_code) if answer and operation else set()
        if known and answer.json()["error"] not in known:
            yield f"{case.method} {case.operation.path}: {answer.status_code} {answer.json()['error']}"


@pytest.mark.long
def test_responses_to_the_operator_match_the_document(server: Server) -> None:
    assert failures(server, lambda: OPERATOR, **{"include-tag": ["me"]}) == []


def test_responses_to_an_agent_match_the_document(server: Server) -> None:
    def header() -> dict[str, str]:
        # A new one each time: some of what it may do is its end.
        agent = requests.post(f"{server.url}/api/agents", json={"name": "an agent"}, headers=OPERATOR).json()
        grant = {"grant_type": "client_credentials"}
        proof = (agent["client_id"], agent["client_secret"])
        return bearer(requests.post(f"{server.url}/oauth/token", grant, auth=proof).json())

    assert failures(server, header, **{"exclude-tag": ["me"]}) == []
