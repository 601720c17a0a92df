"""The service routes and the one error shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from support.callers import OPERATOR, Operator

import config
from database import writing
from models import SigningKey


def test_the_front_page_names_and_links(client: FlaskClient) -> None:
    response = client.get("/")
    assert (response.json["name"], response.json["version"]) == ("Lanyard", config.VERSION)
    for path in response.json["links"].values():
        assert client.get(path).status_code != 404


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


def test_a_crash_is_a_json_500_that_tells_nothing(
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


def test_nothing_is_kept_by_caches_unless_it_says_so(client: FlaskClient) -> None:
    for path in ("/", "/health", "/nowhere", "/api/agents"):
        assert client.get(path).headers["Cache-Control"] == "no-store"


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
    "byte order mark": b'\xef\xbb\xbf{"name": "x"}',
    "nested lists": b"[" * 60_000,
    "nested objects": b'{"a":' * 10_000,
    "repeated name": b'{"name": "x", "name": "y"}',
    "text after it": b'{"name": "x"} {}',
    "NUL": b'{"name": "x"}\0',
}


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
