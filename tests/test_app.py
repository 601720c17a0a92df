"""The service routes, the one error shape, the headers of every answer, and CORS."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, Operator, ask_token
from werkzeug.test import TestResponse

import config
from app import HEADERS
from database import writing
from models import SigningKey

BAD_BODIES: dict[str, bytes] = {
    "a list": b"[]",
    "a string": b'"name"',
    "null": b"null",
    "a number": b"1",
    "cut off": b'{"name": ',
    "single quotes": b"{'name': 'x'}",
    "NaN": b'{"name": "x", "token_ttl": NaN}',
    "Infinity": b'{"name": "x", "token_ttl": Infinity}',
    "5000 digits": b'{"name": "x", "token_ttl": ' + b"9" * 5000 + b"}",
    "invalid UTF-8": b'{"name": "\xff"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "nested lists": b"[" * 60_000,
    "nested objects": b'{"a":' * 10_000,
    "repeated name": b'{"name": "x", "name": "y"}',
    "text after it": b'{"name": "x"} {}',
    "NUL": b'{"name": "x"}\0',
}


PAGE = "https://app.example.com"


OTHER = "https://evil.example.com"


def test_the_front_page_names_and_links(client: FlaskClient) -> None:
    response = client.get("/")
    assert (response.json["name"], response.json["version"]) == ("Lanyard", config.VERSION)
    for path in response.json["links"].values():
        assert client.get(path).status_code != 404


def test_links_and_locations_have_the_issuers_path(make_app: Callable[..., Flask]) -> None:
    app = make_app(ISSUER="https://id.example.com/lanyard")
    client = app.test_client()
    assert all(path.startswith("/lanyard/") for path in client.get("/").json["links"].values())
    created = Operator(app).call("POST", json={"name": "x"})
    assert created.headers["Location"] == f"/lanyard/api/agents/{created.json['agent']['id']}"


@pytest.mark.parametrize("path", ["//health", "//api/agents", "/%00", "/api/agents/%00"])
def test_a_path_with_nul_or_two_slashes_first_is_not_found(client: FlaskClient, path: str) -> None:
    response = client.get("/", environ_overrides={"PATH_INFO": unquote(path)}, headers=OPERATOR)
    assert (response.status_code, response.json["error"]) == (404, "not_found")


def test_a_byte_order_mark_is_ignored(client: FlaskClient) -> None:
    body = b'\xef\xbb\xbf{"name": "x"}'
    response = client.post("/api/agents", data=body, content_type="application/json", headers=OPERATOR)
    assert response.status_code == 201


@pytest.mark.parametrize("path", ["/api/agents", "/oauth/token"])
def test_a_compressed_body_is_refused(client: FlaskClient, path: str) -> None:
    headers = {**OPERATOR, "Content-Encoding": "gzip"}
    response = client.post(path, data=gzip.compress(b"{}"), content_type="application/json", headers=headers)
    assert (response.status_code, response.json["error"]) == (415, "unsupported_media_type")
    assert "Content-Encoding" in response.json["error_description"]


def test_no_path_at_all_is_the_front_page(client: FlaskClient) -> None:
    # What `GET http://localhost HTTP/1.1`, as a proxy is asked, comes to.
    response = client.get("/", environ_overrides={"PATH_INFO": ""})
    assert (response.status_code, response.json) == (200, client.get("/").json)


def test_health_answers_while_the_process_lives(client: FlaskClient) -> None:
    assert (client.get("/health").status_code, client.get("/health").json) == (200, {"status": "ok"})


def test_ready_when_the_database_writes_and_a_key_signs(client: FlaskClient) -> None:
    assert client.get("/health/ready").status_code == 200


def test_not_ready_without_a_signing_key(app: Flask, client: FlaskClient) -> None:
    with app.app_context(), writing() as connection:
        connection.execute(sa.delete(SigningKey))
    response = client.get("/health/ready")
    assert (response.status_code, response.json["error"]) == (503, "temporarily_unavailable")
    assert response.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    "path", ["/nowhere", "/api", "/api/agents/", "//api/agents", "/oauth", "/%00", "/\ud800é"]
)
def test_an_unknown_address_is_a_json_404(client: FlaskClient, path: str) -> None:
    response = client.get(path.encode("utf-8", "surrogatepass").decode("latin-1"))
    assert (response.status_code, response.mimetype) == (404, "application/json")
    assert response.json["error"] == "not_found"


@pytest.mark.parametrize("method", ["OPTIONS", "DELETE", "PATCH", "TRACE", "BREW"])
def test_another_method_is_a_json_405_that_names_the_right_ones(client: FlaskClient, method: str) -> None:
    response = client.open("/oauth/token", method=method)
    assert (response.status_code, response.json["error"]) == (405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


def test_a_crash_is_a_json_500_without_details(
    make_app: Callable[..., Flask], caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()

    def crash() -> None:
        raise RuntimeError("an inner matter")

    app.add_url_rule("/crash", view_func=crash)
    response = app.test_client().get("/crash")
    assert (response.status_code, response.json["error"]) == (500, "server_error")
    assert "inner matter" not in response.text
    assert "inner matter" in caplog.text


def test_answers_are_no_store_by_default(client: FlaskClient) -> None:
    for path in ("/", "/health", "/nowhere", "/api/agents"):
        assert client.get(path).headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["", "/{id}", "/{id}/rotate", "/{id}/deactivate"])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_json_object_is_named(
    client: FlaskClient, operator: Operator, agent: dict[str, Any], path: str, body: bytes
) -> None:
    url = "/api/agents" + path.format(id=agent["agent"]["id"])
    before = operator.get(agent)
    response = client.post(url, data=body, content_type="application/json", headers=OPERATOR)
    assert (response.status_code, response.json["error"]) == (400, "invalid_request")
    assert list(response.json["fields"]) == ["body"]
    assert operator.get(agent) == before


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/xml",
        "application/vnd.api+json",
        "",
        "é",
    ],
)
def test_a_body_of_another_type_is_a_415(client: FlaskClient, content_type: str) -> None:
    response = client.post("/api/agents", data='{"name": "x"}', content_type=content_type, headers=OPERATOR)
    assert (response.status_code, response.json["error"]) == (415, "unsupported_media_type")


def test_json_with_a_charset_is_json(client: FlaskClient) -> None:
    type_ = "application/json; charset=utf-8"
    response = client.post("/api/agents", data='{"name": "x"}', content_type=type_, headers=OPERATOR)
    assert response.status_code == 201


@pytest.mark.parametrize("size", [65_537, 70_000])
def test_a_body_over_64_kib_is_a_413(client: FlaskClient, size: int) -> None:
    body = b'{"name": "' + b"x" * (size - 12) + b'"}'
    assert len(body) == size
    response = client.post("/api/agents", data=body, content_type="application/json", headers=OPERATOR)
    assert (response.status_code, response.json["error"]) == (413, "payload_too_large")


def test_a_body_of_64_kib_is_read(client: FlaskClient) -> None:
    body = json.dumps({"name": "x"}).ljust(65_536)
    response = client.post("/api/agents", data=body, content_type="application/json", headers=OPERATOR)
    assert response.status_code == 201


def test_a_name_that_utf_8_cannot_carry_is_still_named(client: FlaskClient) -> None:
    body = rb'{"name": "x", "\ud800\u0000": 1}'
    response = client.post("/api/agents", data=body, content_type="application/json", headers=OPERATOR)
    assert response.status_code == 400
    assert list(response.json["fields"]) == ["\ud800\0"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/health", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/oauth/token", 405),
        ("OPTIONS", "/oauth/token", 405),
        ("GET", "/api/agents", 401),
        ("POST", "/oauth/token", 400),
        ("GET", "/crash", 500),
    ],
)
def test_every_answer_has_security_headers_and_an_id(app: Flask, method: str, path: str, status: int) -> None:
    app.add_url_rule("/crash", view_func=lambda: 1 / 0)
    response = app.test_client().open(path, method=method)
    assert response.status_code == status
    assert HEADERS.items() <= dict(response.headers).items()
    assert response.headers["X-Request-Id"].startswith("req_")
    assert "Strict-Transport-Security" not in response.headers


def test_a_refusal_in_local_mode_has_security_headers_too(make_app: Callable[..., Flask]) -> None:
    response = make_app(LOCAL="1").test_client().get("/", headers={"Host": "evil.example.com"})
    assert response.status_code == 403
    assert HEADERS.items() <= dict(response.headers).items()
    assert response.headers["X-Request-Id"].startswith("req_")


def test_cacheable_answers_stay_cacheable(client: FlaskClient) -> None:
    first = client.get("/.well-known/jwks.json")
    again = client.get("/.well-known/jwks.json", headers={"If-None-Match": first.headers["ETag"]})
    for response, status in ((first, 200), (again, 304)):
        assert response.status_code == status
        assert response.headers["Cache-Control"].startswith("public, max-age=")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_a_page_may_have_a_policy_of_its_own(app: Flask) -> None:
    own = {"Content-Security-Policy": "default-src 'self'"}
    app.add_url_rule("/page", view_func=lambda: ("", 200, own))
    found = app.test_client().get("/page").headers.getlist("Content-Security-Policy")
    assert found == ["default-src 'self'"]


@pytest.mark.parametrize(
    ("proxies", "proto", "told"),
    [("1", "https", True), ("1", "http", False), ("0", "https", False)],
    ids=["tls", "plain", "claimed"],
)
def test_hsts_is_sent_over_tls_only(
    make_app: Callable[..., Flask], proxies: str, proto: str, told: bool
) -> None:
    client = make_app(TRUSTED_PROXIES=proxies).test_client()
    found = client.get("/nowhere", headers={"X-Forwarded-Proto": proto}).headers
    assert found.get("Strict-Transport-Security") == ("max-age=31536000" if told else None)


# CORS


@pytest.fixture
def cors(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app(CORS_ORIGINS=f"{PAGE}, http://localhost:3000").test_client()


def preflight(client: FlaskClient, origin: str, path: str = "/api/agents") -> TestResponse:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    return client.options(path, headers={"Origin": origin, **asked})


def cors_headers(response: TestResponse) -> dict[str, str]:
    return {name: value for name, value in response.headers if name.startswith("Access-Control-")}


@pytest.mark.parametrize("path", ["/", "/oauth/token", "/api/agents"])
def test_no_origin_is_allowed_by_default(client: FlaskClient, path: str) -> None:
    response = preflight(client, PAGE, path)
    assert (response.status_code, response.json["error"]) == (405, "method_not_allowed")
    for found in (response, client.get("/health", headers={"Origin": PAGE})):
        assert cors_headers(found) == {}
        assert "Vary" not in found.headers


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
def test_a_preflight_of_a_named_origin_is_answered(cors: FlaskClient, origin: str) -> None:
    response = preflight(cors, origin)
    assert (response.status_code, response.data) == (204, b"")
    assert cors_headers(response) == {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Request-Id",
        "Access-Control-Max-Age": "600",
        "Access-Control-Expose-Headers": "X-Request-Id, Retry-After, WWW-Authenticate, Location",
    }
    assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize(
    "origin",
    [OTHER, PAGE + ".evil.example", PAGE + ":8443", PAGE.upper(), "http://app.example.com", "null", "", "*"],
)
def test_a_preflight_of_another_origin_is_not(cors: FlaskClient, origin: str) -> None:
    response = preflight(cors, origin)
    assert (response.status_code, cors_headers(response)) == (405, {})
    assert response.headers["Vary"] == "Origin"


def test_options_that_is_no_preflight_is_a_405(cors: FlaskClient) -> None:
    assert cors.options("/api/agents", headers={"Origin": PAGE}).status_code == 405


@pytest.mark.parametrize("path", ["/api/agents", "/nowhere", "/oauth/token", "/.well-known/jwks.json"])
def test_a_page_of_a_named_origin_may_read_answers_and_errors(cors: FlaskClient, path: str) -> None:
    response = cors.get(path, headers={"Origin": PAGE})
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert "Access-Control-Allow-Credentials" not in response.headers
    assert cors_headers(cors.get(path, headers={"Origin": OTHER})) == {}
    assert cors.get(path).headers["Vary"] == "Origin"


def test_a_page_still_needs_credentials(cors: FlaskClient, agent: dict[str, Any]) -> None:
    at = {"Origin": PAGE}
    assert cors.post("/api/agents", json={"name": "x"}, headers=at).status_code == 401
    assert cors.post("/api/agents", json={"name": "x"}, headers={**at, **OPERATOR}).status_code == 201
    assert ask_token(cors, agent).status_code == 200
