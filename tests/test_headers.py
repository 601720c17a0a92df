"""What every answer carries, and which pages of other sites may call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import headers
import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, ask_token
from werkzeug.test import TestResponse

PAGE = "https://app.example.com"
OTHER = "https://evil.example.com"


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
def test_every_answer_carries_them_and_an_id(app: Flask, method: str, path: str, status: int) -> None:
    app.add_url_rule("/crash", view_func=lambda: 1 / 0)
    response = app.test_client().open(path, method=method)
    assert response.status_code == status
    assert headers.EVERYWHERE.items() <= dict(response.headers).items()
    assert response.headers["X-Request-Id"].startswith("req_")
    assert "Strict-Transport-Security" not in response.headers


def test_a_stranger_in_local_mode_gets_them_too(make_app: Callable[..., Flask]) -> None:
    response = make_app(LOCAL="1").test_client().get("/", headers={"Host": "evil.example.com"})
    assert response.status_code == 403
    assert headers.EVERYWHERE.items() <= dict(response.headers).items()
    assert response.headers["X-Request-Id"].startswith("req_")


def test_what_is_cacheable_stays_so(client: FlaskClient) -> None:
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
def test_hsts_is_told_over_tls_only(
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
def test_no_page_is_let_in_unless_the_setting_says_so(client: FlaskClient, path: str) -> None:
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
